//! Whether work is taken by locks, because others are at work in the same spiegel database.

use std::sync::Arc;
use tokio::sync::watch;

/// Said to everybody who would work without locks.
#[derive(Clone)]
pub struct Mixed {
    on: Arc<watch::Sender<bool>>,
    is_fixed: bool,
}

impl Mixed {
    /// It stays so.
    pub fn always(on: bool) -> Self {
        Self { on: Arc::new(watch::Sender::new(on)), is_fixed: true }
    }

    /// Off until others show themselves.
    pub fn auto() -> Self {
        Self { on: Arc::new(watch::Sender::new(false)), is_fixed: false }
    }

    pub fn is_on(&self) -> bool {
        *self.on.borrow()
    }

    pub fn is_fixed(&self) -> bool {
        self.is_fixed
    }

    pub fn set(&self, on: bool) {
        self.on.send_replace(on);
    }

    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.on.subscribe()
    }
}
