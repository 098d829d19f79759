//! The command line and the container's variables of Node Spiegel 1.2, as values of our own keys.
//!
//! A flag `--batch-size` is the variable `BATCH_SIZE`; a flag beats a variable. The variables count only in the original's way
//! of starting, because their names are everybody's. Seconds and milliseconds stay what they were there.

use super::layers::{Origin, Raw, URL_KEY, Unit, nearest};
use std::collections::BTreeMap;
use std::fmt;

/// What `--type` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Install,
    Uninstall,
    UpdateListener,
    ChangeListener,
    Replicator,
}

impl Type {
    pub const ALL: [Type; 5] = [Type::Install, Type::Uninstall, Type::UpdateListener, Type::ChangeListener, Type::Replicator];

    pub fn name(self) -> &'static str {
        match self {
            Type::Install => "install",
            Type::Uninstall => "uninstall",
            Type::UpdateListener => "update-listener",
            Type::ChangeListener => "change-listener",
            Type::Replicator => "replicator",
        }
    }
}

/// What the original's flags said, by their names.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "As Node Spiegel 1.2 (with --type, instead of a command)")]
pub struct OriginalFlags {
    /// install, uninstall, update-listener, change-listener or replicator; in a container TYPE
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<String>,
    /// Databases (update-listener) or changes (change-listener) that are taken together [default: 100]
    #[arg(long, value_name = "COUNT")]
    pub batch_size: Option<String>,
    /// How long an update-listener gathers databases [default: 1000]
    #[arg(long, value_name = "MILLISECONDS")]
    pub batch_timeout: Option<String>,
    /// How often an update-listener saves its position [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub save_seq_after: Option<String>,
    /// How long somebody else's lock counts [default: 10800]
    #[arg(long, value_name = "SECONDS")]
    pub retry_after: Option<String>,
    /// How often stale locks are looked for [default: 600]
    #[arg(long, value_name = "SECONDS")]
    pub check_stalled: Option<String>,
    /// How long a database may be missing before its document is deleted [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub assume_deleted_after: Option<String>,
    /// Documents locked at once [default: 20]
    #[arg(long, value_name = "COUNT")]
    pub concurrency: Option<String>,
    /// linear or exponential [default: linear]
    #[arg(long, value_name = "STRATEGY")]
    pub backoff_strategy: Option<String>,
    /// What an exponential pause grows by [default: 2]
    #[arg(long, value_name = "FACTOR")]
    pub backoff_multiplier: Option<String>,
    /// The pause before a failed request is tried again, the first one if exponential [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub backoff_delay: Option<String>,
    /// Tries of a failed request; 0: without end [default: 0]
    #[arg(long, value_name = "COUNT")]
    pub backoff_limit: Option<String>,
}

/// A start in the original's way.
#[derive(Debug, Clone)]
pub struct Original {
    pub kind: Type,
    /// Whether a flag or a variable said so.
    pub by_flag: bool,
    pub flags: OriginalFlags,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    Seconds,
    Milliseconds,
}

/// One option, and its key in each type that it goes with.
struct Known {
    flag: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    keys: &'static [(Type, &'static str)],
}

const fn option(flag: &'static str, kind: Kind, default: Option<&'static str>, keys: &'static [(Type, &'static str)]) -> Known {
    Known { flag, kind, default, keys }
}

const fn everywhere(key: &'static str) -> [(Type, &'static str); 5] {
    let [a, b, c, d, e] = Type::ALL;
    [(a, key), (b, key), (c, key), (d, key), (e, key)]
}

const fn workers(key: &'static str) -> [(Type, &'static str); 2] {
    [(Type::ChangeListener, key), (Type::Replicator, key)]
}

const URL: [(Type, &str); 5] = everywhere(URL_KEY);
const LOG_LEVEL: [(Type, &str); 5] = everywhere("log.level");
const DB_NAME: [(Type, &str); 5] = everywhere("db_name");
const NAMESPACE: [(Type, &str); 5] = everywhere("namespace");
const PASSWORDS_FILE: [(Type, &str); 2] = workers("passwords_file");
const RETRY_AFTER: [(Type, &str); 2] = workers("roles.retry_after");
const CHECK_STALLED: [(Type, &str); 2] = workers("roles.check_stalled");
const ASSUME_DELETED_AFTER: [(Type, &str); 2] = workers("db.assume_deleted_after");
const CONCURRENCY: [(Type, &str); 2] = workers("roles.concurrency");

/// As the original's usage text has them.
const OPTIONS: [Known; 16] = [
    option("--url", Kind::Text, None, &URL),
    option("--log-level", Kind::Text, None, &LOG_LEVEL),
    option("--db-name", Kind::Text, None, &DB_NAME),
    option("--namespace", Kind::Text, None, &NAMESPACE),
    option("--batch-timeout", Kind::Milliseconds, Some("1000"), &[(Type::UpdateListener, "roles.batch_timeout")]),
    option("--save-seq-after", Kind::Seconds, Some("60"), &[(Type::UpdateListener, "feed.save_seq_after")]),
    option("--passwords-file", Kind::Text, None, &PASSWORDS_FILE),
    option(
        "--batch-size",
        Kind::Number,
        Some("100"),
        &[(Type::UpdateListener, "roles.batch_size"), (Type::ChangeListener, "db.batch_size")],
    ),
    option("--retry-after", Kind::Seconds, Some("10800"), &RETRY_AFTER),
    option("--assume-deleted-after", Kind::Seconds, Some("300"), &ASSUME_DELETED_AFTER),
    option("--concurrency", Kind::Number, Some("20"), &CONCURRENCY),
    option("--check-stalled", Kind::Seconds, Some("600"), &CHECK_STALLED),
    option("--backoff-strategy", Kind::Text, Some("linear"), &[(Type::ChangeListener, "deliveries.retry_strategy")]),
    option("--backoff-multiplier", Kind::Number, Some("2"), &[(Type::ChangeListener, "deliveries.retry_multiplier")]),
    option("--backoff-delay", Kind::Seconds, Some("5"), &[(Type::ChangeListener, "deliveries.retry_delay")]),
    option("--backoff-limit", Kind::Number, Some("0"), &[(Type::ChangeListener, "deliveries.retry_limit")]),
];

impl Known {
    fn variable(&self) -> String {
        self.flag.trim_start_matches('-').replace('-', "_").to_uppercase()
    }

    fn key(&self, kind: Type) -> Option<&'static str> {
        self.keys.iter().find(|(with, _)| *with == kind).map(|(_, key)| *key)
    }

    fn raw(&self, text: &str) -> Raw {
        match self.kind {
            Kind::Text | Kind::Number => Raw::Text(text.to_string()),
            Kind::Seconds => Raw::Counted { text: text.to_string(), unit: Unit::Seconds },
            Kind::Milliseconds => Raw::Counted { text: text.to_string(), unit: Unit::Milliseconds },
        }
    }

    fn value<'a>(&self, flags: &'a OriginalFlags) -> Option<&'a str> {
        let given = match self.flag {
            "--batch-timeout" => &flags.batch_timeout,
            "--save-seq-after" => &flags.save_seq_after,
            "--batch-size" => &flags.batch_size,
            "--retry-after" => &flags.retry_after,
            "--assume-deleted-after" => &flags.assume_deleted_after,
            "--concurrency" => &flags.concurrency,
            "--check-stalled" => &flags.check_stalled,
            "--backoff-strategy" => &flags.backoff_strategy,
            "--backoff-multiplier" => &flags.backoff_multiplier,
            "--backoff-delay" => &flags.backoff_delay,
            "--backoff-limit" => &flags.backoff_limit,
            // These are ours as well.
            _ => &None,
        };
        given.as_deref()
    }
}

/// A usage error, for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misused(pub String);

impl fmt::Display for Misused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl OriginalFlags {
    /// The first flag that was given, for whoever may not have one.
    pub fn first(&self) -> Option<&'static str> {
        let kind = self.kind.as_ref().map(|_| "--type");
        kind.or_else(|| OPTIONS.iter().find(|option| option.value(self).is_some()).map(|option| option.flag))
    }
}

impl Original {
    /// None where nobody asked for the original's way. `has_passwords_file`: that flag is ours as well.
    pub fn of(
        flags: &OriginalFlags,
        has_passwords_file: bool,
        environment: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, Misused> {
        let variable = environment.get("TYPE").filter(|text| !text.is_empty());
        let (text, by_flag) = match (&flags.kind, variable) {
            (Some(text), _) => (text, true),
            (None, Some(text)) => (text, false),
            (None, None) => return flags.first().map_or(Ok(None), |flag| Err(lacks_type(flag))),
        };
        let says = if by_flag { "flag --type" } else { "environment TYPE" };
        let names = Type::ALL.map(Type::name);
        let Some(kind) = Type::ALL.into_iter().find(|kind| kind.name() == text) else {
            let shown: String = text.chars().take(60).collect();
            let near = nearest(text, &names).map_or_else(String::new, |name| format!("; did you mean {name}?"));
            return Err(Misused(format!("{shown:?} ({says}) is not a type: allowed are {}{near}", names.join(", "))));
        };
        let is_given =
            |option: &&Known| option.value(flags).is_some() || (has_passwords_file && option.flag == "--passwords-file");
        if let Some(option) = OPTIONS.iter().filter(is_given).find(|option| option.key(kind).is_none()) {
            let with: Vec<&str> = option.keys.iter().map(|(kind, _)| kind.name()).collect();
            let problem =
                format!("{} does not go with type {} ({says}), but with {}", option.flag, kind.name(), with.join(" and "));
            return Err(Misused(problem));
        }
        Ok(Some(Self { kind, by_flag, flags: flags.clone() }))
    }

    /// The defaults of the original, which lie below everything that anybody said.
    pub(super) fn defaults(&self) -> Vec<(&'static str, Raw)> {
        let mut defaults: Vec<_> = self.options().filter_map(|(option, key)| Some((key, option.raw(option.default?)))).collect();
        defaults.push(("log.format", Raw::Text(String::from("bunyan"))));
        // Several processes share a machine, and the original has no port.
        defaults.push(("admin.listen", Raw::Text(String::new())));
        defaults
    }

    /// What the variables say, the type above all.
    pub(super) fn variables(&self, environment: &BTreeMap<String, String>) -> Vec<(&'static str, Raw, Origin)> {
        let given = |option: &Known| {
            let name = option.variable();
            environment.get(&name).filter(|text| !text.is_empty()).map(|text| (option.raw(text), Origin::Environment { name }))
        };
        let mut said: Vec<_> =
            self.options().filter_map(|(option, key)| given(option).map(|(raw, origin)| (key, raw, origin))).collect();
        if !matches!(self.kind, Type::Install | Type::Uninstall) {
            let origin = match self.by_flag {
                true => Origin::Flag { name: "--type" },
                false => Origin::Environment { name: String::from("TYPE") },
            };
            said.push(("role", Raw::Text(self.kind.name().to_string()), origin));
        }
        said
    }

    pub(super) fn flags(&self) -> Vec<(&'static str, Raw, Origin)> {
        let given = |option: &Known| Some((option.raw(option.value(&self.flags)?), Origin::Flag { name: option.flag }));
        self.options().filter_map(|(option, key)| given(option).map(|(raw, origin)| (key, raw, origin))).collect()
    }

    fn options(&self) -> impl Iterator<Item = (&'static Known, &'static str)> {
        let kind = self.kind;
        OPTIONS.iter().filter_map(move |option| Some((option, option.key(kind)?)))
    }

    /// The variables of other types: the original would refuse to start.
    pub(super) fn ignored(&self, environment: &BTreeMap<String, String>) -> Vec<String> {
        let others = OPTIONS.iter().filter(|option| option.key(self.kind).is_none()).map(Known::variable);
        others.filter(|name| environment.get(name).is_some_and(|text| !text.is_empty())).collect()
    }
}

fn lacks_type(flag: &str) -> Misused {
    let names = Type::ALL.map(Type::name).join("|");
    Misused(format!("{flag} goes with --type={names}, which is missing"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::layers::defaults;
    use super::super::{LogFormat, Role, Settings, Sources, load};
    use super::*;
    use std::time::Duration;

    fn started(kind: Type, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> Sources {
        let environment = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let mut given = OriginalFlags { kind: Some(kind.name().to_string()), ..OriginalFlags::default() };
        for (flag, value) in flags {
            let slot = match *flag {
                "--batch-size" => &mut given.batch_size,
                "--batch-timeout" => &mut given.batch_timeout,
                "--save-seq-after" => &mut given.save_seq_after,
                "--retry-after" => &mut given.retry_after,
                "--check-stalled" => &mut given.check_stalled,
                "--assume-deleted-after" => &mut given.assume_deleted_after,
                "--concurrency" => &mut given.concurrency,
                "--backoff-strategy" => &mut given.backoff_strategy,
                "--backoff-multiplier" => &mut given.backoff_multiplier,
                "--backoff-delay" => &mut given.backoff_delay,
                "--backoff-limit" => &mut given.backoff_limit,
                other => panic!("{other} is no flag of the original alone"),
            };
            *slot = Some(value.to_string());
        }
        let original = Original::of(&given, false, &environment).expect("legal").expect("a type");
        Sources { environment, original: Some(original), ..Sources::default() }
    }

    fn settings(kind: Type, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> Settings {
        load(started(kind, variables, flags)).expect("legal").settings
    }

    /// What a type makes of an option, in our own unit.
    fn read(settings: &Settings, key: &str) -> String {
        let seconds = |duration: Duration| format!("{}", duration.as_secs_f64());
        match key {
            URL_KEY => settings.couchdb.url.to_string(),
            "db_name" => settings.db_name.clone(),
            "namespace" => settings.namespace.clone(),
            "log.level" => settings.log.level.clone(),
            "passwords_file" => settings.passwords_file.clone().unwrap_or_default().display().to_string(),
            "roles.batch_timeout" => seconds(settings.roles.batch_timeout),
            "roles.batch_size" => settings.roles.batch_size.to_string(),
            "roles.concurrency" => settings.roles.concurrency.to_string(),
            "roles.retry_after" => seconds(settings.roles.retry_after),
            "roles.check_stalled" => seconds(settings.roles.check_stalled),
            "feed.save_seq_after" => seconds(settings.feed.save_seq_after),
            "db.batch_size" => settings.db.batch_size.to_string(),
            "db.assume_deleted_after" => seconds(settings.db.assume_deleted_after),
            "deliveries.retry_strategy" => {
                if settings.deliveries.retry.exponential { "exponential" } else { "linear" }.to_string()
            }
            "deliveries.retry_multiplier" => settings.deliveries.retry.multiplier.to_string(),
            "deliveries.retry_delay" => seconds(settings.deliveries.retry.delay),
            "deliveries.retry_limit" => settings.deliveries.retry.limit.unwrap_or(0).to_string(),
            other => panic!("{other} is not read here"),
        }
    }

    /// Of each option: a value as the original's user writes it, and that in our own unit.
    fn another(flag: &str) -> (&'static str, &'static str) {
        match flag {
            "--url" => ("http://u:p@couch.example:5984", "http://couch.example:5984/"),
            "--log-level" => ("debug", "debug"),
            "--db-name" => ("mirror", "mirror"),
            "--namespace" => ("test_", "test_"),
            "--passwords-file" => ("/run/passwords.json", "/run/passwords.json"),
            "--batch-timeout" => ("250", "0.25"),
            "--save-seq-after" => ("90", "90"),
            "--batch-size" => ("7", "7"),
            "--retry-after" => ("60", "60"),
            "--assume-deleted-after" => ("0.5", "0.5"),
            "--concurrency" => ("3", "3"),
            "--check-stalled" => ("4", "4"),
            "--backoff-strategy" => ("exponential", "exponential"),
            "--backoff-multiplier" => ("1.5", "1.5"),
            "--backoff-delay" => ("8", "8"),
            "--backoff-limit" => ("9", "9"),
            other => panic!("{other} is new: give it another value here"),
        }
    }

    #[test]
    fn each_option_of_each_type_is_a_variable_and_a_flag_in_its_own_unit() {
        for kind in Type::ALL {
            for option in OPTIONS {
                let Some(key) = option.key(kind) else { continue };
                assert!(defaults().contains_key(key), "{key} is no key of ours");
                let (written, meant) = another(option.flag);
                let by_variable = settings(kind, &[(&option.variable(), written)], &[]);
                assert_eq!(read(&by_variable, key), meant, "{} of {}", option.variable(), kind.name());
                if option.default.is_some() {
                    let by_flag = settings(kind, &[(&option.variable(), "77")], &[(option.flag, written)]);
                    assert_eq!(read(&by_flag, key), meant, "{} of {} beats the variable", option.flag, kind.name());
                }
            }
        }
    }

    #[test]
    fn the_defaults_are_the_original_s() {
        for kind in Type::ALL {
            let settings = settings(kind, &[], &[]);
            assert_eq!((settings.log.format, settings.admin_listen), (LogFormat::Bunyan, None), "{}", kind.name());
            for option in OPTIONS {
                if let (Some(key), Some(default)) = (option.key(kind), option.default) {
                    let ours = if option.flag == "--batch-timeout" { "1" } else { default };
                    assert_eq!(read(&settings, key), ours, "{} of {}", option.flag, kind.name());
                }
            }
        }
    }

    #[test]
    fn a_type_is_a_role() {
        let cases = [
            (Type::Install, Role::Everything),
            (Type::Uninstall, Role::Everything),
            (Type::UpdateListener, Role::UpdateListener),
            (Type::ChangeListener, Role::ChangeListener),
            (Type::Replicator, Role::Replicator),
        ];
        for (kind, role) in cases {
            assert_eq!(settings(kind, &[], &[]).role, role);
        }
    }

    #[test]
    fn the_original_s_variables_lie_above_ours_and_its_defaults_below_everything() {
        let ours = [("SPIEGEL_DB_BATCH_SIZE", "8"), ("SPIEGEL_LOG_FORMAT", "human"), ("SPIEGEL_ADMIN_LISTEN", "0.0.0.0:9595")];
        let loaded = settings(Type::ChangeListener, &ours, &[]);
        assert_eq!((loaded.db.batch_size, loaded.log.format), (8, LogFormat::Human));
        assert!(loaded.admin_listen.is_some());
        let both = [("SPIEGEL_DB_BATCH_SIZE", "8"), ("BATCH_SIZE", "9")];
        assert_eq!(settings(Type::ChangeListener, &both, &[]).db.batch_size, 9);
    }

    #[test]
    fn zeros_mean_at_once() {
        let zeros = [("SAVE_SEQ_AFTER", "0"), ("BATCH_TIMEOUT", "0")];
        let loaded = settings(Type::UpdateListener, &zeros, &[]);
        assert_eq!((loaded.feed.save_seq_after, loaded.roles.batch_timeout), (Duration::from_millis(1), Duration::ZERO));
    }

    #[test]
    fn errors_name_what_the_user_wrote() {
        let cases: [(Type, &str, &str, &str); 6] = [
            (Type::ChangeListener, "RETRY_AFTER", "3h", "\"3h\" is not a number of seconds"),
            (Type::UpdateListener, "BATCH_TIMEOUT", "-1", "\"-1\" is not a number of milliseconds"),
            (Type::UpdateListener, "SAVE_SEQ_AFTER", "1e300", "\"1e300\" is out of range"),
            (Type::ChangeListener, "BATCH_SIZE", "many", "\"many\" is not a whole number"),
            (Type::ChangeListener, "BACKOFF_STRATEGY", "cubic", "\"cubic\" is no strategy"),
            (Type::Replicator, "LOG_LEVEL", "loud", "\"loud\" is not a level"),
        ];
        for (kind, variable, value, problem) in cases {
            let errors = load(started(kind, &[(variable, value)], &[])).expect_err("a refusal").0;
            let origin = format!("environment {variable}");
            let named = |error: &String| error.contains(&origin) && error.contains(problem);
            assert!(matches!(errors.as_slice(), [one] if named(one)), "{variable}={value}: {errors:?}");
        }
        let errors = load(started(Type::ChangeListener, &[], &[("--backoff-multiplier", "x")])).expect_err("a refusal").0;
        assert!(errors[0].contains("flag --backoff-multiplier"), "{errors:?}");
    }

    #[test]
    fn a_type_that_is_none_is_told_with_the_nearest() {
        for (text, near) in [("instal", "install"), ("update_listener", "update-listener"), ("Replicator", "replicator")] {
            let environment = BTreeMap::from([(String::from("TYPE"), text.to_string())]);
            let Err(Misused(problem)) = Original::of(&OriginalFlags::default(), false, &environment) else {
                panic!("{text} is none")
            };
            assert!(problem.contains("environment TYPE") && problem.ends_with(&format!("did you mean {near}?")), "{problem}");
        }
    }

    #[test]
    fn what_goes_with_another_type_is_a_mistake_as_a_flag_and_a_warning_as_a_variable() {
        let flags =
            OriginalFlags { kind: Some(String::from("replicator")), batch_size: Some(String::from("5")), ..Default::default() };
        let Err(Misused(problem)) = Original::of(&flags, false, &BTreeMap::new()) else { panic!("it is refused") };
        assert!(problem.contains("--batch-size") && problem.contains("update-listener and change-listener"), "{problem}");
        let flags = OriginalFlags { kind: Some(String::from("install")), ..Default::default() };
        assert!(Original::of(&flags, true, &BTreeMap::new()).is_err(), "--passwords-file is nothing to install");
        let loaded = load(started(Type::Replicator, &[("BATCH_SIZE", "5")], &[])).expect("legal");
        assert!(loaded.warnings.iter().any(|warning| warning.contains("BATCH_SIZE")), "{:?}", loaded.warnings);
    }

    #[test]
    fn the_numbers_of_the_original_s_levels_are_levels() {
        for (level, expected) in
            [("10", "trace"), ("20", "debug"), ("30", "info"), ("40", "warn"), ("50", "error"), ("fatal", "error")]
        {
            assert_eq!(settings(Type::Replicator, &[("LOG_LEVEL", level)], &[]).log.level, expected);
        }
    }
}
