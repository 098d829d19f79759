//! Arguments ▶ config ▶ run; exit codes. Nothing else.

use spiegel::cmd::{self, Args, Exit};
use spiegel::config;
use std::process::ExitCode;
use std::time::Duration;

/// It gives memory back after a burst of busy databases, which glibc's does not.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// For what a finished command may have left behind on a blocking thread (a look-up of a name).
const LEFTOVERS_TIMEOUT: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    let args = match Args::of_this_process() {
        Ok(args) => args,
        Err(exit) => return exit.into(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return cmd::complain(Exit::Internal, &format!("start the runtime: {error}")).into(),
    };
    let loaded = config::load(args.sources);
    let exit = runtime.block_on(cmd::execute(args.command, loaded));
    runtime.shutdown_timeout(LEFTOVERS_TIMEOUT);
    exit.into()
}
