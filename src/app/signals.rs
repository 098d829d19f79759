//! SIGTERM and SIGINT: the first asks for an orderly end, the second for any.

#[allow(clippy::disallowed_methods, reason = "somebody who asks twice wants no orderly end")]
pub(super) fn end_at_once() -> ! {
    std::process::exit(130)
}

/// Heard from its making on.
pub struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    pub fn new() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}
