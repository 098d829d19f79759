//! What the demo tells: who did what, when, as aligned lines.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Who acts in a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Person(&'static str),
    Spiegel,
    /// The receiver, as a user of Spiegel would write it.
    Api,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Person(name) => name,
            Who::Spiegel => "spiegel",
            Who::Api => "api",
        }
    }

    fn colour(self) -> &'static str {
        match self {
            Who::Person(_) => "33",
            Who::Spiegel => "36",
            Who::Api => "32",
        }
    }
}

/// A terminal, or a test's buffer.
pub type Out = Box<dyn Write + Send>;

pub struct Story {
    out: Mutex<Out>,
    is_coloured: bool,
    start: Instant,
}

impl Story {
    pub fn new(out: Out, is_coloured: bool) -> Self {
        Self { out: Mutex::new(out), is_coloured, start: Instant::now() }
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub fn event(&self, who: Who, what: &str) {
        let time = format!("{:6.2}s", self.elapsed().as_secs_f64());
        let name = format!("{:7}", who.name());
        self.say(&format!("{}  {}  {what}", self.paint("2", &time), self.paint(who.colour(), &name)));
    }

    pub fn chapter(&self, title: &str) {
        self.say("");
        self.say(&self.paint("1", title));
    }

    /// That nobody reads any more (`spiegel demo | head`) is no reason to crash.
    pub fn say(&self, line: &str) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(out, "{line}");
        let _ = out.flush();
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        match self.is_coloured {
            true => format!("\u{1b}[{colour}m{text}\u{1b}[0m"),
            false => text.to_string(),
        }
    }
}
