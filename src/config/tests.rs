use super::layers::{Raw, defaults, variable_of};
use super::*;
use std::collections::BTreeSet;

fn environment(pairs: &[(&str, &str)]) -> Sources {
    let environment = pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Sources { environment, ..Sources::default() }
}

fn file(text: &str) -> (tempfile::TempDir, Sources) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("spiegel.toml");
    std::fs::write(&path, text).expect("write the config file");
    let flags = Flags { config: Some(path), ..Flags::default() };
    (dir, Sources { flags, ..Sources::default() })
}

fn errors_of(sources: Sources) -> Vec<String> {
    load(sources).expect_err("a refusal").0
}

/// Another legal value for each key. A key of default.toml that is missing here fails the tests below.
fn another_value(key: &str) -> &'static str {
    match key {
        "db_name" => "mirror",
        "namespace" => "test_",
        "passwords_file" => "/run/passwords.json",
        "secrets_file" => "/run/secrets.json",
        "role" => "replicator",
        "coexist" => "always",
        "roles.batch_size" => "7",
        "roles.batch_timeout" => "2s",
        "roles.concurrency" => "8",
        "roles.retry_after" => "2h",
        "roles.check_stalled" => "2m",
        "roles.stale_after" => "90s",
        "roles.alone_after" => "11m",
        "couchdb.url" => "https://u:p%40ss@couch.example:6984/prefix",
        "couchdb.connect_timeout" => "3s",
        "couchdb.read_timeout" => "31s",
        "feed.heartbeat" => "7s",
        "feed.save_seq_after" => "1m",
        "feed.spill_after" => "33s",
        "feed.sweep_interval" => "2h",
        "debounce.quiet" => "1s",
        "debounce.longest" => "9s",
        "db.batch_size" => "100",
        "db.passivate_after" => "6s",
        "db.assume_deleted_after" => "6m",
        "webhook.concurrency" => "130",
        "webhook.concurrency_per_host" => "7",
        "webhook.per_second_per_host" => "50",
        "webhook.connect_timeout" => "4s",
        "webhook.timeout" => "29s",
        "webhook.fast_retries" => "0",
        "webhook.retry_base" => "1s",
        "webhook.retry_cap" => "6s",
        "webhook.breaker_threshold" => "0",
        "webhook.breaker_base" => "3s",
        "webhook.breaker_cap" => "90s",
        "webhook.retry_after_cap" => "2h",
        "deliveries.retry_strategy" => "linear",
        "deliveries.retry_delay" => "6s",
        "deliveries.retry_multiplier" => "3",
        "deliveries.retry_cap" => "2h",
        "deliveries.retry_limit" => "4",
        "deliveries.give_up_after" => "3d",
        "deliveries.max" => "7",
        "deliveries.max_per_rule_and_database" => "6",
        "deliveries.retention" => "1d",
        "webhook.block_private_networks" => "true",
        "webhook.allow_networks" => "10.1.2.3, fd00::/8",
        "webhook.ca_file" => "/run/ca.pem",
        "replication.concurrency" => "21",
        "replication.concurrency_per_host" => "3",
        "replication.per_second_per_host" => "5",
        "replication.concurrency_per_target" => "2",
        "replication.timeout" => "2h",
        "replication.engine" => "couchdb",
        "replication.requests_per_host" => "65",
        "replication.checkpoint_after" => "6s",
        "replication.source_checkpoint_after" => "6m",
        "backoff.base" => "10s",
        "backoff.cap" => "10m",
        "limits.pending_databases" => "99",
        "admin.listen" => "",
        "shutdown.deadline" => "3s",
        "log.level" => "debug",
        "log.format" => "json",
        unlisted => panic!("{unlisted} is in default.toml: give it another value here"),
    }
}

#[test]
fn the_defaults_are_sound_and_as_documented() {
    let loaded = load(Sources::default()).expect("the defaults are legal");
    let settings = loaded.settings;
    assert_eq!(loaded.warnings, Vec::<String>::new());
    assert_eq!(settings.couchdb.url.as_str(), "http://127.0.0.1:5984/");
    assert_eq!(settings.db_name, "spiegel");
    assert_eq!(settings.passwords_file, None);
    assert_eq!(settings.feed.save_seq_after, Duration::from_secs(5));
    assert_eq!(settings.debounce.quiet, Duration::from_millis(250));
    assert_eq!(settings.webhook.per_second_per_host, None);
    assert_eq!(settings.admin_listen, Some(([127, 0, 0, 1], 9595).into()));
    assert_eq!(settings.log, LogSettings { level: String::from("info"), format: LogFormat::Auto });
}

#[test]
fn each_key_is_read_from_the_environment_and_from_the_file() {
    let unchanged = format!("{:?}", load(Sources::default()).expect("the defaults are legal").settings);
    for (key, default) in defaults() {
        let value = another_value(&key);
        let by_environment = load(environment(&[(&variable_of(&key), value)])).unwrap_or_else(|e| panic!("{key}: {e}")).settings;
        assert_ne!(format!("{by_environment:?}"), unchanged, "{} changed nothing", variable_of(&key));

        let written = if matches!(default, Raw::Integer(_) | Raw::Boolean(_)) { value.to_string() } else { format!("{value:?}") };
        let text = match key.split_once('.') {
            Some((section, name)) => format!("[{section}]\n{name} = {written}\n"),
            None => format!("{key} = {written}\n"),
        };
        let (_dir, sources) = file(&text);
        let by_file = load(sources).unwrap_or_else(|e| panic!("{key}: {e}")).settings;
        assert_eq!(format!("{by_file:?}"), format!("{by_environment:?}"), "{key}: file and environment differ");
    }
}

#[test]
fn no_two_keys_share_a_variable() {
    let keys = defaults();
    let names: BTreeSet<String> = keys.keys().map(|key| variable_of(key)).collect();
    assert_eq!(names.len(), keys.len());
    assert!(keys.len() > 30, "the walk found {} keys", keys.len());
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let (_dir, mut sources) = file("db_name = \"from_file\"\nnamespace = \"from_file\"\n[log]\nlevel = \"error\"\n");
    sources.environment.insert(String::from("SPIEGEL_DB_NAME"), String::from("from_environment"));
    sources.environment.insert(String::from("SPIEGEL_LOG_LEVEL"), String::from("warn"));
    sources.flags.log_level = Some(String::from("trace"));
    let settings = load(sources).expect("legal").settings;
    assert_eq!(settings.namespace, "from_file");
    assert_eq!(settings.db_name, "from_environment");
    assert_eq!(settings.log.level, "trace");
}

#[test]
fn the_examples_are_legal() {
    for text in [
        include_str!("../../config/examples/development.toml"),
        include_str!("../../config/examples/container.toml"),
        include_str!("../../config/examples/many-databases.toml"),
    ] {
        let (_dir, sources) = file(text);
        assert_eq!(load(sources).expect("a legal example").warnings, Vec::<String>::new());
    }
}

#[test]
fn bad_values_are_refused_with_the_key_its_origin_and_what_is_allowed() {
    let cases = [
        (
            "SPIEGEL_FEED_HEARTBEAT",
            "5",
            "feed.heartbeat (environment SPIEGEL_FEED_HEARTBEAT): \"5\" is not a duration: write a number with its unit",
        ),
        ("SPIEGEL_FEED_HEARTBEAT", "99ms", "\"99ms\" is out of range: allowed is from 100ms"),
        ("SPIEGEL_FEED_SAVE_SEQ_AFTER", "0s", "out of range"),
        ("SPIEGEL_FEED_SAVE_SEQ_AFTER", "90000000000000000000y", "not a duration"),
        ("SPIEGEL_FEED_SWEEP_INTERVAL", "400days", "out of range"),
        ("SPIEGEL_DB_BATCH_SIZE", "0", "0\" is out of range: allowed is from 1 to 10000"),
        ("SPIEGEL_DB_BATCH_SIZE", "10001", "out of range"),
        ("SPIEGEL_DB_BATCH_SIZE", "-3", "out of range"),
        ("SPIEGEL_DB_BATCH_SIZE", "many", "not a whole number"),
        ("SPIEGEL_DB_BATCH_SIZE", "", "not a whole number"),
        ("SPIEGEL_DB_NAME", "Spiegel", "not a name that CouchDB takes"),
        ("SPIEGEL_DB_NAME", "_users", "not a name that CouchDB takes"),
        ("SPIEGEL_DB_NAME", "", "not a name that CouchDB takes"),
        ("SPIEGEL_NAMESPACE", "a/b", "may hold letters"),
        ("SPIEGEL_COUCHDB_URL", "", "is empty"),
        ("SPIEGEL_COUCHDB_URL", "127.0.0.1:5984", "must start with http:// or https://"),
        ("SPIEGEL_COUCHDB_URL", "ftp://host", "must start with http:// or https://"),
        ("SPIEGEL_COUCHDB_URL", "http://", "is not a URL"),
        ("SPIEGEL_COUCHDB_URL", "http://host/?a=b", "has a query"),
        ("SPIEGEL_ADMIN_LISTEN", "localhost:9595", "not an IP address with a port"),
        ("SPIEGEL_LOG_LEVEL", "loud", "allowed are error, warn, info, debug and trace"),
        ("SPIEGEL_LOG_FORMAT", "xml", "allowed are auto, human, json and bunyan"),
        ("SPIEGEL_WEBHOOK_PER_SECOND_PER_HOST", "1000001", "out of range"),
        ("SPIEGEL_WEBHOOK_BLOCK_PRIVATE_NETWORKS", "yes", "\"yes\" is neither true nor false"),
        ("SPIEGEL_WEBHOOK_ALLOW_NETWORKS", "10.0.0.0/8, localhost", "is not a list of networks"),
    ];
    for (name, value, expected) in cases {
        let errors = errors_of(environment(&[(name, value)]));
        assert_eq!(errors.len(), 1, "{name}={value}: {errors:?}");
        assert!(errors[0].contains(expected), "{name}={value}: {}", errors[0]);
        assert!(errors[0].contains(name), "{name}={value}: {}", errors[0]);
    }
}

#[test]
fn a_file_is_refused_with_its_line() {
    let cases = [
        ("\n\n[feed]\nheartbeat = 5\n", "spiegel.toml:4): 5 is not a duration"),
        (
            "[db]\nbatch_size = \"200\"\n",
            "spiegel.toml:2): \"200\" is not a whole number: allowed is from 1 to 10000, without quotes",
        ),
        ("[webhook]\nblock_private_networks = \"true\"\n", "spiegel.toml:2): \"true\" is neither true nor false, without quotes"),
        ("db_name = true\n", "spiegel.toml:1): a boolean is not a text"),
        ("[feed]\nheart_beat = \"5s\"\n", "feed.heart_beat ("),
        ("[feed]\nheart_beat = \"5s\"\n", "is not a setting; did you mean feed.heartbeat?"),
        ("[webhooks]\ntimeout = \"5s\"\n", "did you mean webhook.timeout?"),
        ("url = \"http://x\"\n", "did you mean couchdb.url?"),
        ("feed = 5\n", "feed ("),
        ("feed = 5\n", "is a section"),
        ("[feed\n", "spiegel.toml:1: not valid TOML"),
        ("a = 1\na = 2\n", "spiegel.toml:2: not valid TOML"),
    ];
    for (text, expected) in cases {
        let (_dir, sources) = file(text);
        let errors = errors_of(sources);
        assert!(errors.iter().any(|error| error.contains(expected)), "{text:?}: {errors:?}");
        assert!(errors.iter().all(|error| !error.contains('\n')), "{text:?}: {errors:?}");
    }
    let sources = environment(&[("SPIEGEL_CONFIG", "/nowhere/spiegel.toml")]);
    assert!(errors_of(sources)[0].starts_with("config file /nowhere/spiegel.toml: cannot be read"));
}

#[test]
fn contradictory_pairs_are_refused() {
    let cases: [(&[(&str, &str)], &str); 9] = [
        (
            &[("SPIEGEL_DEBOUNCE_QUIET", "3s")],
            "debounce.quiet (environment SPIEGEL_DEBOUNCE_QUIET): \"3s\" is more than debounce.longest = \"2s\" (default)",
        ),
        (&[("SPIEGEL_WEBHOOK_CONCURRENCY_PER_HOST", "129")], "webhook.concurrency = 128 (default)"),
        (&[("SPIEGEL_WEBHOOK_CONCURRENCY", "5"), ("SPIEGEL_WEBHOOK_CONCURRENCY_PER_HOST", "6")], "webhook.concurrency"),
        (&[("SPIEGEL_REPLICATION_CONCURRENCY_PER_HOST", "129")], "replication.concurrency = 128 (default)"),
        (&[("SPIEGEL_WEBHOOK_RETRY_BASE", "6s")], "webhook.retry_cap"),
        (&[("SPIEGEL_WEBHOOK_BREAKER_BASE", "2m")], "webhook.breaker_cap"),
        (&[("SPIEGEL_BACKOFF_BASE", "1h")], "backoff.cap"),
        (&[("SPIEGEL_WEBHOOK_CONNECT_TIMEOUT", "31s")], "webhook.timeout"),
        (&[("SPIEGEL_COUCHDB_READ_TIMEOUT", "4s")], "couchdb.read_timeout"),
    ];
    for (pairs, expected) in cases {
        let errors = errors_of(environment(pairs));
        assert_eq!(errors.len(), 1, "{pairs:?}: {errors:?}");
        assert!(errors[0].contains(expected), "{pairs:?}: {}", errors[0]);
    }
}

#[test]
fn a_host_s_share_follows_the_whole_where_only_the_whole_was_set() {
    let settings = load(environment(&[("SPIEGEL_WEBHOOK_CONCURRENCY", "5"), ("SPIEGEL_REPLICATION_CONCURRENCY", "2")]));
    let settings = settings.expect("legal").settings;
    assert_eq!((settings.webhook.concurrency_per_host, settings.replication.concurrency_per_host), (5, 2));
}

#[test]
fn all_errors_are_reported_at_once() {
    let errors = errors_of(environment(&[
        ("SPIEGEL_COUCHDB_URL", "nonsense"),
        ("SPIEGEL_DB_NAME", "NO"),
        ("SPIEGEL_FEED_HEARTBEAT", "1"),
        ("SPIEGEL_WEBHOOK_TIMOUT", "1s"),
        ("SPIEGEL_LOG_LEVEL", "x"),
    ]));
    assert_eq!(errors.len(), 5, "{errors:?}");
}

#[test]
fn unknown_variables_name_the_nearest() {
    let cases = [
        ("SPIEGEL_URL", "SPIEGEL_COUCHDB_URL?"),
        ("SPIEGEL_DBNAME", "SPIEGEL_DB_NAME?"),
        ("SPIEGEL_SAVE_SEQ_AFTER", "SPIEGEL_FEED_SAVE_SEQ_AFTER?"),
        ("SPIEGEL_PASSWORD_FILE", "SPIEGEL_PASSWORDS_FILE?"),
        ("SPIEGEL_COUCHDB_URLFILE", "SPIEGEL_COUCHDB_URL_FILE?"),
    ];
    for (name, expected) in cases {
        let errors = errors_of(environment(&[(name, "x")]));
        assert!(errors[0].contains(name) && errors[0].ends_with(expected), "{errors:?}");
    }
}

#[test]
fn variables_that_nobody_wrote_for_us_are_passed_over() {
    let sources = environment(&[
        ("SPIEGEL_TEST_URL", "x"),
        ("SPIEGEL_BENCH_N", "x"),
        ("SPIEGEL_SERVICE_HOST", "10.0.0.1"),
        ("SPIEGEL_SERVICE_PORT", "9595"),
        ("SPIEGEL_SERVICE_PORT_HTTP", "9595"),
        ("SPIEGEL_PORT", "tcp://10.0.0.1:9595"),
        ("SPIEGEL_PORT_9595_TCP_ADDR", "10.0.0.1"),
        ("SPIEGEL_ADMIN_SERVICE_HOST", "10.0.0.1"),
        ("HOME", "/root"),
    ]);
    load(sources).expect("nothing of ours");
}

#[test]
fn the_url_can_come_from_a_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("url");
    std::fs::write(&path, " http://admin:s%2Fcret@couch:5984\n").expect("write the secret");
    let path = path.to_string_lossy().into_owned();
    let settings = load(environment(&[("SPIEGEL_COUCHDB_URL_FILE", &path)])).expect("legal").settings;
    assert_eq!(settings.couchdb.url.as_str(), "http://couch:5984/");
    assert_eq!(settings.couchdb.credentials.expect("credentials").user, "admin");

    let both = errors_of(environment(&[("SPIEGEL_COUCHDB_URL_FILE", &path), ("SPIEGEL_COUCHDB_URL", "http://x")]));
    assert!(both[0].contains("SPIEGEL_COUCHDB_URL and SPIEGEL_COUCHDB_URL_FILE"), "{both:?}");
    let missing = errors_of(environment(&[("SPIEGEL_COUCHDB_URL_FILE", "/nowhere/url")]));
    assert!(missing[0].contains("SPIEGEL_COUCHDB_URL_FILE") && missing[0].contains("cannot be read"), "{missing:?}");
}

#[test]
fn no_text_shows_a_password() {
    let urls = [
        "http://admin:hunter2@",
        "http://admin:hunter2@host:port",
        "http://admin:/hunter2@host",
        "http://admin:12/hunter2@host",
        "http://admin:12#hunter2@host",
        "http://admin:12?hunter2@host",
        "htp://admin:hunter2@host",
        "admin:hunter2@host",
    ];
    for url in urls {
        let (_dir, cut_off) = file(&format!("[couchdb]\nurl = \"{url}"));
        let (_dir2, unquoted) = file(&format!("[couchdb]\nurl = {url}\n"));
        for sources in [
            environment(&[("SPIEGEL_COUCHDB_URL", url)]),
            environment(&[("SPIEGEL_DB_NAME", url)]),
            environment(&[("SPIEGEL_ADMIN_LISTEN", url)]),
            environment(&[("SPIEGEL_FEED_HEARTBEAT", url)]),
            environment(&[("SPIEGEL_WHATEVER", url)]),
            cut_off,
            unquoted,
        ] {
            let errors = errors_of(sources).join("\n");
            assert!(!errors.contains("cannot be read"), "{errors}");
            assert!(!errors.contains("hunter2"), "{url}: {errors}");
        }
    }
    let loaded = load(environment(&[("SPIEGEL_COUCHDB_URL", "http://admin:hunter2@host")])).expect("legal");
    assert!(!format!("{loaded:?}").contains("hunter2"));
}

#[test]
fn a_url_without_a_type_warns_in_a_container() {
    let url = ("URL", "http://admin:s3cret@host");
    for (pairs, is_container, expected) in [
        (&[url][..], true, 1),
        (&[url], false, 0),
        (&[("URL", "")], true, 0),
        (&[], true, 0),
        // Somebody else's, perhaps.
        (&[url, ("SPIEGEL_COUCHDB_URL", "http://admin:secret@other")], true, 0),
    ] {
        let warnings = load(Sources { is_container, ..environment(pairs) }).expect("legal").warnings;
        assert_eq!(warnings.len(), expected, "{pairs:?}: {warnings:?}");
        assert!(warnings.iter().all(|text| text.contains("TYPE") && !text.contains("s3cret")), "{warnings:?}");
    }
}

#[test]
fn risky_settings_warn() {
    let cases: [(&[(&str, &str)], &str); 6] = [
        (&[("SPIEGEL_WEBHOOK_ALLOW_NETWORKS", "10.0.0.0/8")], "webhook.block_private_networks"),
        (&[("SPIEGEL_DEBOUNCE_LONGEST", "30s")], "debounce.longest"),
        (&[("SPIEGEL_SHUTDOWN_DEADLINE", "1m")], "Docker"),
        (&[("SPIEGEL_FEED_HEARTBEAT", "2m")], "feed.heartbeat"),
        (&[("SPIEGEL_FEED_SWEEP_INTERVAL", "2days")], "feed.sweep_interval"),
        (&[("SPIEGEL_COUCHDB_URL", "http://admin@host")], "no password"),
    ];
    for (pairs, expected) in cases {
        let warnings = load(environment(pairs)).expect("legal").warnings;
        assert_eq!(warnings.len(), 1, "{pairs:?}: {warnings:?}");
        assert!(warnings[0].contains(expected), "{pairs:?}: {warnings:?}");
    }
    let flags = Flags { url: Some(String::from("http://admin:secret@host")), ..Flags::default() };
    let warnings = load(Sources { flags, ..Sources::default() }).expect("legal").warnings;
    assert!(warnings[0].contains("process list"), "{warnings:?}");
}
