//! A process of Node Spiegel, where SPIEGEL_TEST_ORIGINAL names a checkout of it that runs.

use super::lab::Lab;
use super::server::environment;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

pub struct Original(Child);

impl Original {
    /// Where it is; None and a line where nobody says so.
    pub fn program() -> Option<PathBuf> {
        let checkout = environment("SPIEGEL_TEST_ORIGINAL");
        if checkout.is_none() {
            println!("passed over: SPIEGEL_TEST_ORIGINAL names no checkout of Node Spiegel");
        }
        checkout.map(|path| PathBuf::from(path).join("bin/cmd.js"))
    }

    pub fn start(program: &PathBuf, lab: &Lab, kind: &str) -> Self {
        let mut command = Command::new("node");
        command.arg(program).arg(format!("--type={kind}")).arg(format!("--url={}", lab.couch.url()));
        command.arg(format!("--db-name={}", lab.spiegel_db())).arg(format!("--namespace={}", lab.prefix));
        if kind != "update-listener" {
            command.arg(format!("--passwords-file={}", lab.settings()["SPIEGEL_PASSWORDS_FILE"]));
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self(child.expect("node runs"))
    }
}

impl Drop for Original {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
