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

use crate::config::original::{Original, OriginalFlags, Type};
use crate::config::{self, ConfigErrors, Flags, Loaded, LogSettings, Settings, Sources};
use crate::couch::{Couch, CouchError};
use crate::telemetry::{self, Metrics};
use crate::vault::{Vault, redact_text};
use crate::webhook::HttpSender;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use rules::RulesCommand;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Debug, Parser)]
#[command(
    name = "spiegel",
    about = "Acts on CouchDB's changes: replicates the databases that changed and calls an HTTP API for the documents that changed.",
    disable_help_subcommand = true,
    disable_version_flag = true,
    override_usage = "spiegel [OPTIONS] <COMMAND>\n       spiegel --type=<TYPE> --url=<URL> [OPTIONS]",
    after_help = "To start:\n  \
        export SPIEGEL_COUCHDB_URL=http://user:password@127.0.0.1:5984\n  \
        spiegel install   # creates the spiegel database\n  \
        spiegel check     # says what is missing, and what to do\n  \
        spiegel run"
)]
struct CommandLine {
    /// Print version
    #[arg(short = 'V', long, num_args = 0..=1, require_equals = true, default_missing_value = "")]
    version: Option<String>,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    original: OriginalFlags,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What this process is to do, and where its settings come from.
#[derive(Debug)]
pub struct Args {
    pub command: Command,
    pub sources: Sources,
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
    /// What the container image does where it is given no command: as TYPE says, or run
    #[command(hide = true)]
    Container,
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
        Self::parse_or_say(std::env::args_os(), config::environment_of_this_process())
    }

    fn parse_or_say(arguments: impl IntoIterator<Item = OsString>, environment: BTreeMap<String, String>) -> Result<Self, Exit> {
        let mut arguments: Vec<OsString> = arguments.into_iter().collect();
        // The original's image names its program once more.
        if arguments.get(1).is_some_and(|first| first == ORIGINAL_PROGRAM) {
            arguments.remove(1);
        }
        let is_bare = arguments.len() <= 1;
        let line = CommandLine::try_parse_from(arguments).map_err(|error| say_error(&error))?;
        match line.resolve(environment, is_bare) {
            Ok(Resolved::Args(args)) => Ok(*args),
            Ok(Resolved::Help) => {
                let help = CommandLine::command().render_long_help();
                let _ = write!(std::io::stderr(), "{help}");
                Err(Exit::Usage)
            }
            Ok(Resolved::Version(text)) => {
                say(&text);
                Err(Exit::Done)
            }
            Err(error) => Err(say_error(&error)),
        }
    }
}

const ORIGINAL_PROGRAM: &str = "/usr/local/bin/spiegel";

enum Resolved {
    Args(Box<Args>),
    Version(String),
    /// Nothing was asked for.
    Help,
}

impl CommandLine {
    /// The environment counts only where no command is given.
    fn resolve(self, environment: BTreeMap<String, String>, is_bare: bool) -> Result<Resolved, clap::Error> {
        let misused = |problem: String| Self::command().error(ErrorKind::ValueValidation, problem);
        match self.version.as_deref() {
            Some("") => return Ok(Resolved::Version(String::from(concat!("spiegel ", env!("CARGO_PKG_VERSION"))))),
            Some(_) => return Ok(Resolved::Version(String::from(env!("CARGO_PKG_VERSION")))),
            None => {}
        }
        let is_in_container = self.command == Some(Command::Container);
        if let (Some(command), false) = (&self.command, is_in_container) {
            if let Some(flag) = self.original.first() {
                return Err(misused(format!("{flag} is Node Spiegel's, and goes with --type instead of a command")));
            }
            let command = command.clone().meant(&self.flags);
            let sources = Sources { environment, flags: self.flags, ..Sources::default() };
            return Ok(Resolved::Args(Box::new(Args { command, sources })));
        }
        if environment.get("VERSION").is_some_and(|text| text == "true") {
            return Ok(Resolved::Version(String::from(env!("CARGO_PKG_VERSION"))));
        }
        let has_passwords_file = self.flags.passwords_file.is_some();
        let original = Original::of(&self.original, has_passwords_file, &environment).map_err(|error| misused(error.0))?;
        let command = match original.as_ref().map(|original| original.kind) {
            Some(Type::Install) => Command::Install,
            Some(Type::Uninstall) => Command::Uninstall,
            Some(Type::UpdateListener | Type::ChangeListener | Type::Replicator) => Command::Run { install: false },
            None if is_in_container => Command::Run { install: false },
            None if is_bare => return Ok(Resolved::Help),
            None => return Err(Self::command().error(ErrorKind::MissingSubcommand, "a command is missing, or --type")),
        };
        let sources = Sources { environment, flags: self.flags, original, is_container: is_in_container };
        match sources.original.is_some() && !sources.name_couchdb() {
            true => Err(misused(String::from(
                "--url (or the variable URL) is missing: the address of CouchDB, with an admin and the password",
            ))),
            false => Ok(Resolved::Args(Box::new(Args { command, sources }))),
        }
    }
}

impl Command {
    /// Settings do not tell whether a level was asked for.
    #[cfg_attr(not(feature = "dev"), allow(unused_mut, unused_variables))]
    fn meant(mut self, flags: &Flags) -> Self {
        #[cfg(feature = "dev")]
        if let Command::Demo { with_logs } = &mut self {
            *with_logs = flags.log_level.is_some();
        }
        self
    }
}

fn say_error(error: &clap::Error) -> Exit {
    if error.kind() == ErrorKind::DisplayHelp {
        let _ = error.print();
        return Exit::Done;
    }
    // An argument in the wrong place is repeated in the text, and may be a URL with its password.
    let rendered = error.render();
    let text = if std::io::stderr().is_terminal() { rendered.ansi().to_string() } else { rendered.to_string() };
    let _ = write!(std::io::stderr(), "{}", redact_text(&text));
    Exit::Usage
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
        // Never here: what it means was found out with the command line.
        Command::Container => Ok(Exit::Done),
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

    fn parse_in(environment: &[(&str, &str)], line: &str) -> Result<Args, Exit> {
        let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Args::parse_or_say(line.split_whitespace().map(OsString::from), environment)
    }

    fn parse(line: &str) -> Result<Args, Exit> {
        parse_in(&[], line)
    }

    #[test]
    fn the_command_line_is_sound() {
        CommandLine::command().debug_assert();
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
            let flags = args.sources.flags;
            assert_eq!((flags.url.as_deref(), flags.db_name.as_deref()), (Some("http://h"), Some("d")), "{line}");
        }
        assert_eq!(parse("spiegel run --install").expect("legal").command, Command::Run { install: true });
    }

    #[test]
    fn the_original_s_way_is_chosen_by_the_type_alone() {
        let run = Command::Run { install: false };
        let url = ("URL", "http://h");
        let kind = |kind| ("TYPE", kind);
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a str, Result<Command, Exit>);
        let cases: [Case<'_>; 31] = [
            (&[], "spiegel --type=install --url=http://h", Ok(Command::Install)),
            (&[], "spiegel --type uninstall --url http://h", Ok(Command::Uninstall)),
            (&[], "spiegel --url=http://h --type=update-listener --batch-size 5 --batch-timeout=7", Ok(run.clone())),
            (&[], "spiegel --type=change-listener --url=http://h --passwords-file=x --backoff-delay 3", Ok(run.clone())),
            (&[], "spiegel --type=replicator --url=http://h --concurrency=3 --retry-after=1", Ok(run.clone())),
            (&[], "spiegel /usr/local/bin/spiegel --type=replicator --url=http://h", Ok(run.clone())),
            (&[kind("install"), url], "spiegel", Ok(Command::Install)),
            (&[kind("install"), url], "spiegel container", Ok(Command::Install)),
            (&[kind("replicator"), url], "spiegel --log-level=debug", Ok(run.clone())),
            (&[kind("install"), url], "spiegel --type=uninstall", Ok(Command::Uninstall)),
            (&[kind("uninstall"), ("SPIEGEL_COUCHDB_URL_FILE", "/run/secrets/url")], "spiegel", Ok(Command::Uninstall)),
            (&[kind("uninstall"), url], "spiegel check", Ok(Command::Check)),
            (&[kind("uninstall"), url], "spiegel run", Ok(run.clone())),
            (&[kind("no-such-type"), url], "spiegel check", Ok(Command::Check)),
            (&[], "spiegel container", Ok(run.clone())),
            (&[url], "spiegel container", Ok(run.clone())),
            (&[kind("")], "spiegel container", Ok(run)),
            (&[("VERSION", "true")], "spiegel", Err(Exit::Done)),
            (&[("VERSION", "true"), kind("install"), url], "spiegel container", Err(Exit::Done)),
            (&[("VERSION", "2.0")], "spiegel", Err(Exit::Usage)),
            (&[], "spiegel --version=true", Err(Exit::Done)),
            (&[kind("")], "spiegel", Err(Exit::Usage)),
            (&[url], "spiegel", Err(Exit::Usage)),
            (&[], "spiegel --type=install", Err(Exit::Usage)),
            (&[kind("install")], "spiegel", Err(Exit::Usage)),
            (&[kind("instal"), url], "spiegel", Err(Exit::Usage)),
            (&[], "spiegel --type=Replicator --url=http://h", Err(Exit::Usage)),
            (&[], "spiegel --type=replicator --url=http://h --batch-size=5", Err(Exit::Usage)),
            (&[], "spiegel --type=install --url=http://h --passwords-file=x", Err(Exit::Usage)),
            (&[url], "spiegel --batch-size=5", Err(Exit::Usage)),
            (&[url], "spiegel --batch-size=5 run", Err(Exit::Usage)),
        ];
        for (environment, line, expected) in cases {
            assert_eq!(parse_in(environment, line).map(|args| args.command), expected, "{environment:?} {line}");
        }
    }
}
