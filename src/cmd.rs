//! The command line: one file a subcommand.
//!
//! Exit codes: 0 done, 1 no (`healthcheck`: not ready, `rules test`: nothing to send, `deliveries`: what was named is not there,
//! `import-replicator`: something was left that a person must look at), 64 usage, 65 a file that a command was given cannot be used,
//! 69 CouchDB unreachable at a one-shot command, 70 internal, 78 bad config. `run` waits for a CouchDB that does not answer instead of leaving.

mod check;
mod deliveries;
#[cfg(feature = "dev")]
mod demo;
mod design;
#[cfg(feature = "dev")]
mod dev;
mod documents;
mod healthcheck;
mod import_replicator;
mod install;
mod rules;
mod run;
mod status;
mod table;
mod uninstall;

use crate::config::{ConfigErrors, Flags, Loaded, LogSettings, Settings};
use crate::couch::{Couch, CouchError};
use crate::telemetry::{self, Metrics};
use crate::vault::{Vault, redact_text};
use crate::webhook::HttpSender;
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use rules::RulesCommand;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Debug, Parser)]
#[command(
    name = "spiegel",
    version,
    about = "Acts on CouchDB's changes: replicates the databases that changed and calls an HTTP API for the documents that changed.",
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    after_help = "To start:\n  \
        export SPIEGEL_COUCHDB_URL=http://user:password@127.0.0.1:5984\n  \
        spiegel install   # creates the spiegel database\n  \
        spiegel check     # says what is missing, and what to do\n  \
        spiegel run"
)]
pub struct Args {
    #[command(flatten)]
    pub flags: Flags,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Watch CouchDB and act on what changes, until stopped
    Run {
        /// Create the spiegel database first, where it is missing
        #[arg(long)]
        install: bool,
    },
    /// Create the spiegel database, its views, the deliveries database and the sieve; doing it twice is fine
    Install,
    /// Remove the sieve, the deliveries database, and the spiegel database with all rules, replicators and positions
    Uninstall,
    /// Look whether everything is in place, and say what to do where it is not
    Check,
    /// Show what the running process does, or what the spiegel database tells of it
    Status {
        /// List replicators that are settled, too
        #[arg(long)]
        all: bool,
    },
    /// List the rules, show what one would send, enable one that is disabled
    #[command(subcommand)]
    Rules(RulesCommand),
    /// Deliveries that failed: look at them, have them tried again, drop them
    #[command(subcommand)]
    Deliveries(deliveries::Command),
    /// Turn the continuous jobs of `_replicator` into replicators, or back; shows what it would do until --apply is given
    ImportReplicator(import_replicator::Options),
    /// Print the version
    Version,
    /// Ask the running process whether it is alive: exit code 0 or 1 (for containers)
    Healthcheck {
        /// Ask whether it is ready: CouchDB answers, and the feed is open
        #[arg(long)]
        ready: bool,
    },
    /// Serve a CouchDB-compatible database in memory, to develop against
    #[cfg(feature = "dev")]
    Dev(dev::Options),
    /// Show in seconds what Spiegel does, with nothing installed; logs only with --log-level
    #[cfg(feature = "dev")]
    Demo {
        #[arg(skip)]
        with_logs: bool,
    },
}

impl Command {
    fn is_service(&self) -> bool {
        matches!(self, Command::Run { .. })
    }

    /// The demo tells its own story, and nothing interrupts it unasked.
    fn log_settings(&self, settings: &Settings) -> LogSettings {
        match self {
            #[cfg(feature = "dev")]
            Command::Demo { with_logs: false } => LogSettings { level: String::from("off"), ..settings.log.clone() },
            _ => settings.log.clone(),
        }
    }
}

/// How a command ended; sysexits' numbers, as operators' tools know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    /// The answer to what was asked.
    No = 1,
    Usage = 64,
    Data = 65,
    Unreachable = 69,
    Internal = 70,
    Config = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a command could not do its work: for a person, with what to do about it.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// `doing` is a verb and its object: "create the database".
    fn of_couch(couch: &Couch, doing: &str, error: &CouchError) -> Self {
        let exit = match error {
            CouchError::Unauthorized(_) | CouchError::Forbidden(_) => Exit::Config,
            error if error.is_outage() => Exit::Unreachable,
            _ => Exit::Internal,
        };
        let hint = match error {
            CouchError::Unauthorized(_) | CouchError::Forbidden(_) => "; couchdb.url must name an admin and the admin's password",
            CouchError::Unreachable(_) => "; is couchdb.url right, and does CouchDB run?",
            _ => "",
        };
        Self { exit, message: format!("{doing} on {}: {error}{hint}", couch.address()) }
    }
}

impl Args {
    /// Help and errors are printed here; what remains is the exit code.
    pub fn of_this_process() -> Result<Self, Exit> {
        Self::parse_or_say(std::env::args_os())
    }

    fn parse_or_say(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Exit> {
        let error = match Self::try_parse_from(arguments) {
            Ok(args) => return Ok(args.with_what_flags_mean()),
            Err(error) => error,
        };
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            let _ = error.print();
            return Err(Exit::Done);
        }
        // An argument in the wrong place is repeated in the text, and may be a URL with its password.
        let rendered = error.render();
        let text = if std::io::stderr().is_terminal() { rendered.ansi().to_string() } else { rendered.to_string() };
        let _ = write!(std::io::stderr(), "{}", redact_text(&text));
        Err(Exit::Usage)
    }

    /// Settings do not tell whether a level was asked for.
    #[cfg_attr(not(feature = "dev"), allow(unused_mut))]
    fn with_what_flags_mean(mut self) -> Self {
        #[cfg(feature = "dev")]
        if let Command::Demo { with_logs } = &mut self.command {
            *with_logs = self.flags.log_level.is_some();
        }
        self
    }
}

pub async fn execute(command: Command, loaded: Result<Loaded, ConfigErrors>) -> Exit {
    match &command {
        Command::Version => {
            say(concat!("spiegel ", env!("CARGO_PKG_VERSION")));
            return Exit::Done;
        }
        Command::Check => return check::check(loaded).await,
        Command::Rules(RulesCommand::Test(options)) => return rules::test(options),
        _ => {}
    }
    let loaded = match loaded {
        Ok(loaded) => loaded,
        Err(errors) => {
            for error in &errors.0 {
                complain(Exit::Config, error);
            }
            return Exit::Config;
        }
    };
    telemetry::start_logs(&command.log_settings(&loaded.settings));
    let is_service = command.is_service();
    match one(command, loaded).await {
        Ok(exit) => exit,
        // Whoever collects a service's logs collects events, and no bare lines.
        Err(failure) if is_service => {
            tracing::error!("{}", failure.message);
            failure.exit
        }
        Err(failure) => complain(failure.exit, &failure.message),
    }
}

async fn one(command: Command, loaded: Loaded) -> Result<Exit, Failure> {
    let settings = loaded.settings;
    match command {
        Command::Run { install } => {
            for warning in &loaded.warnings {
                tracing::warn!("{warning}");
            }
            run::run(settings, install).await
        }
        Command::Install => install::command(&settings).await,
        Command::Uninstall => uninstall::command(&settings).await,
        Command::Rules(RulesCommand::List) => rules::list(&settings).await,
        Command::Rules(RulesCommand::Enable { id }) => deliveries::enable_rule(&settings, &id).await,
        Command::Status { all } => status::command(&settings, all).await,
        Command::Deliveries(command) => deliveries::command(&settings, command).await,
        Command::ImportReplicator(options) => import_replicator::command(&settings, options).await,
        Command::Healthcheck { ready } => healthcheck::command(&settings, ready).await,
        #[cfg(feature = "dev")]
        Command::Dev(options) => dev::dev(options).await,
        #[cfg(feature = "dev")]
        Command::Demo { .. } => demo::demo().await,
        // Done above: they need no sound config.
        Command::Version | Command::Check | Command::Rules(RulesCommand::Test(_)) => Ok(Exit::Done),
    }
}

/// A line on stdout. That nobody reads any more (`spiegel check | head`) is no reason to crash, which `println!` would.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line on stderr; hands the exit code through.
pub fn complain(exit: Exit, message: &str) -> Exit {
    let _ = writeln!(std::io::stderr(), "spiegel: {message}");
    exit
}

fn couch(settings: &Settings) -> Result<Couch, Failure> {
    Couch::new(settings.couchdb.clone(), Metrics::new()).map_err(|error| Failure::new(Exit::Internal, error.to_string()))
}

/// Everything that webhooks need from the disk is read here once, so that what is wrong with it is said at the start.
fn vault(settings: &Settings) -> Result<Arc<Vault>, Failure> {
    let refuse = |error: String| Failure::new(Exit::Config, redact_text(&error));
    let vault = Vault::load(settings.passwords_file.as_deref(), settings.secrets_file.as_deref());
    let vault = vault.map(Arc::new).map_err(|error| refuse(error.to_string()))?;
    match HttpSender::new(&settings.webhook, vault.clone(), Metrics::new()) {
        Ok(_) => Ok(vault),
        Err(error) => Err(refuse(format!("{error:#}"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Exit> {
        Args::parse_or_say(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn usage_errors_exit_64_and_help_exits_0() {
        let cases = [
            ("spiegel", Exit::Usage),
            ("spiegel --db-name x", Exit::Usage),
            ("spiegel nonsense", Exit::Usage),
            ("spiegel run --nonsense", Exit::Usage),
            ("spiegel run extra", Exit::Usage),
            ("spiegel run --url", Exit::Usage),
            ("spiegel --help", Exit::Done),
            ("spiegel run --help", Exit::Done),
            ("spiegel --version", Exit::Done),
        ];
        for (line, expected) in cases {
            assert_eq!(parse(line).map(|args| args.command), Err(expected), "{line}");
        }
    }

    #[test]
    fn flags_may_stand_before_or_behind_the_command() {
        for line in ["spiegel --url http://h --db-name d run", "spiegel run --url http://h --db-name d"] {
            let args = parse(line).expect("legal");
            assert_eq!(args.command, Command::Run { install: false });
            assert_eq!((args.flags.url.as_deref(), args.flags.db_name.as_deref()), (Some("http://h"), Some("d")), "{line}");
        }
        assert_eq!(parse("spiegel run --install").expect("legal").command, Command::Run { install: true });
    }
}
