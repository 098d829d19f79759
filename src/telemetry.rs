//! Logs, and the name of every metric.
//!
//! A secret never reaches this module: URLs are redacted by `vault::redact_text` before they become a field or a label. An event
//! is one line, whatever a text inside it holds, so that nobody can write a line of ours by naming a document.

mod bunyan;
mod labels;
mod metrics;

pub use metrics::{ChildLabels, Metrics, OutcomeLabels, RequestLabels, StateLabels};

use crate::config::{LogFormat, LogSettings};
use std::io::{IsTerminal, Write};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;

/// Starts logging to stderr; for `bunyan` to stdout, as it is piped from there. Only the first call of a process has an effect.
pub fn start_logs(settings: &LogSettings) {
    let is_terminal = std::io::stderr().is_terminal();
    let wants_colour = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let human = match settings.format {
        LogFormat::Human => true,
        LogFormat::Json | LogFormat::Bunyan => false,
        LogFormat::Auto => is_terminal,
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(OneLine(std::io::stderr)).with_target(false);
    let registry = tracing_subscriber::registry().with(targets(&settings.level));
    let started = match human {
        _ if settings.format == LogFormat::Bunyan => {
            let layer = tracing_subscriber::fmt::layer().with_writer(OneLine(std::io::stdout));
            registry.with(layer.event_format(bunyan::Bunyan::of_this_process())).try_init()
        }
        true => registry.with(layer.with_ansi(wants_colour)).try_init(),
        false => registry.with(layer.json().flatten_event(true).with_current_span(false).with_span_list(false)).try_init(),
    };
    if started.is_ok() {
        log_panics();
    }
}

/// Ours at the level asked for; the libraries' from warn up, and everything at trace.
fn targets(level: &str) -> Targets {
    let ours = level.parse().unwrap_or(LevelFilter::INFO);
    let theirs = if ours == LevelFilter::TRACE { ours } else { ours.min(LevelFilter::WARN) };
    Targets::new().with_default(theirs).with_target("spiegel", ours)
}

/// A panic is caught by whoever supervises; here it only becomes an event like any other instead of several bare lines.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, panic = text.unwrap_or("no text"), "panicked");
    }));
}

/// Hands out writers that write each event as one line.
struct OneLine<M>(M);

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for OneLine<M> {
    type Writer = OneLineWriter<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        OneLineWriter(self.0.make_writer())
    }
}

struct OneLineWriter<W>(W);

impl<W: Write> Write for OneLineWriter<W> {
    /// The formatter writes a whole event at once, its line's end last.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        let text = event.strip_suffix(b"\n").unwrap_or(event);
        match text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            false => self.0.write_all(event)?,
            true => {
                let mut line = Vec::with_capacity(event.len() + 16);
                for byte in text {
                    match byte {
                        b'\n' => line.extend_from_slice(b"\\n"),
                        b'\r' => line.extend_from_slice(b"\\r"),
                        other => line.push(*other),
                    }
                }
                line.push(b'\n');
                self.0.write_all(&line)?;
            }
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn libraries_speak_from_warn_up_unless_all_is_asked_for() {
        let cases = [
            ("error", "spiegel::feed", Level::WARN, false),
            ("error", "hyper", Level::WARN, false),
            ("info", "spiegel::feed", Level::INFO, true),
            ("info", "spiegel::feed", Level::DEBUG, false),
            ("debug", "spiegel", Level::DEBUG, true),
            ("debug", "hyper::client", Level::INFO, false),
            ("debug", "ractor", Level::WARN, true),
            ("trace", "reqwest", Level::TRACE, true),
        ];
        for (level, target, of, expected) in cases {
            assert_eq!(targets(level).would_enable(target, &of), expected, "{level} {target} {of}");
        }
    }

    #[test]
    fn an_event_is_one_line() {
        let cases = [("plain\n", "plain\n"), ("two\nlines\r\n", "two\\nlines\\r\n"), ("no end", "no end"), ("\n", "\n")];
        for (event, expected) in cases {
            let mut out = OneLineWriter(Vec::new());
            out.write_all(event.as_bytes()).expect("a vector takes everything");
            assert_eq!(String::from_utf8_lossy(&out.0), expected);
        }
    }
}
