//! What a rule says about how its requests are delivered: signed by whom, retried how, in which order, how many together.

pub(in crate::rules) mod fields;

use reqwest::header::{HeaderName, HeaderValue};
use std::sync::Arc;
use std::time::Duration;

/// What stands beside a rule's pattern, URL and params. Its default is the original's behaviour.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Handling {
    /// The name of the vault's secret that signs the requests.
    pub secret: Option<Arc<str>>,
    pub headers: Vec<(HeaderName, HeaderSource)>,
    /// None: `application/json`.
    pub content_type: Option<HeaderValue>,
    pub retry: Retry,
    /// Statuses beside 408, 429 and 5xx that are worth another try; None: all but 410.
    pub retry_on: Option<Vec<Statuses>>,
    pub on_failure: OnFailure,
    pub order: Order,
    /// A revision that was superseded before it was sent is skipped.
    pub latest_only: bool,
    pub batch: Option<Batch>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderSource {
    Text(HeaderValue),
    /// The name of a secret of the vault.
    Secret(Arc<str>),
}

/// What a rule says of its own; None: as the settings say.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Retry {
    pub strategy: Option<Strategy>,
    pub delay: Option<Duration>,
    pub multiplier: Option<f64>,
    pub cap: Option<Duration>,
    /// Tries after the fast ones; 0: without end.
    pub limit: Option<u32>,
    /// Since the first failure; None: never.
    pub give_up_after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    Linear,
    Exponential,
}

/// Statuses of one hundred, or one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statuses {
    /// 4 for 4xx.
    Class(u16),
    One(u16),
}

impl Statuses {
    /// 410 is never worth another try: it disables the rule.
    pub fn contains(self, status: u16) -> bool {
        match self {
            Statuses::Class(hundred) => status / 100 == hundred && status != 410,
            Statuses::One(one) => status == one,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// The delivery is parked by itself, and the others go on.
    #[default]
    Park,
    /// The rule waits in this database.
    Hold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Deliveries for one document keep their order.
    #[default]
    Document,
    /// Deliveries for one database do.
    Database,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    pub max: usize,
    /// How long the first change may wait for others.
    pub within: Duration,
}
