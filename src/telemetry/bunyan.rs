//! Events as the tool `bunyan` reads them: a JSON object a line, with the fields that its format asks for.

use serde_json::{Map, Value, json};
use std::fmt;
use std::time::SystemTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Bunyan's own; a field of ours by such a name gets an underscore.
const CORE: [&str; 7] = ["name", "hostname", "pid", "level", "msg", "time", "v"];

pub struct Bunyan {
    hostname: String,
    pid: u32,
}

impl Bunyan {
    pub fn of_this_process() -> Self {
        let files = ["/proc/sys/kernel/hostname", "/etc/hostname"];
        let named = files.into_iter().find_map(|file| std::fs::read_to_string(file).ok()).map(|name| name.trim().to_string());
        Self {
            hostname: named.filter(|name| !name.is_empty()).unwrap_or_else(|| String::from("unknown")),
            pid: std::process::id(),
        }
    }

    fn record(&self, level: Level, at: SystemTime, said: Said) -> Value {
        let mut record = Map::new();
        record.insert(String::from("name"), json!("spiegel"));
        record.insert(String::from("hostname"), json!(self.hostname));
        record.insert(String::from("pid"), json!(self.pid));
        record.insert(String::from("level"), json!(number_of(level)));
        record.insert(String::from("msg"), json!(said.message));
        for (name, value) in said.fields {
            let is_core = CORE.contains(&name);
            record.insert(if is_core { format!("{name}_") } else { String::from(name) }, value);
        }
        record.insert(String::from("time"), json!(humantime::format_rfc3339_millis(at).to_string()));
        record.insert(String::from("v"), json!(0));
        Value::Object(record)
    }
}

fn number_of(level: Level) -> u8 {
    match level {
        Level::ERROR => 50,
        Level::WARN => 40,
        Level::INFO => 30,
        Level::DEBUG => 20,
        Level::TRACE => 10,
    }
}

impl<S, N> FormatEvent<S, N> for Bunyan
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut said = Said::default();
        event.record(&mut said);
        writeln!(writer, "{}", self.record(*event.metadata().level(), SystemTime::now(), said))
    }
}

/// What one event carries.
#[derive(Default)]
struct Said {
    message: String,
    fields: Vec<(&'static str, Value)>,
}

impl Said {
    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => self.fields.push((name, value)),
        }
    }
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, Value::from(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, Value::from(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, Value::from(value));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::prelude::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("not poisoned").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_record_is_what_bunyan_reads() {
        let kept = Kept::default();
        let writer = kept.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let layer = layer.event_format(Bunyan { hostname: String::from("box"), pid: 7 });
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(db = %"a\nb", retry_in_ms = 5u64, name = "x", level = 1.5, "first \"line\"\nsecond");
            tracing::error!("second event");
        });
        let text = String::from_utf8(kept.0.lock().expect("not poisoned").clone()).expect("text");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a line is an object")).collect();
        assert_eq!(lines.len(), 2, "{text}");
        let [first, second] = lines.as_slice() else { panic!("{text}") };
        assert_eq!((&first["name"], &first["hostname"], &first["pid"]), (&json!("spiegel"), &json!("box"), &json!(7)));
        assert_eq!((&first["level"], &first["v"], &second["level"]), (&json!(40), &json!(0), &json!(50)));
        assert_eq!(first["msg"], "first \"line\"\nsecond");
        assert_eq!((&first["db"], &first["retry_in_ms"]), (&json!("a\nb"), &json!(5)));
        assert_eq!((&first["name_"], &first["level_"]), (&json!("x"), &json!(1.5)), "what is bunyan's stays bunyan's");
        let time = first["time"].as_str().expect("a time");
        assert!(time.ends_with('Z') && humantime::parse_rfc3339(time).is_ok(), "{time}");
    }
}
