//! What the config says of deliveries that failed, in their own words.

use crate::config::{DeliverySettings, Settings};
use crate::deliveries;
use crate::deliveries::index::Bounds;
use crate::deliveries::patience::Patience;
use crate::rules::handling::Strategy;
use std::time::Duration;

pub(super) fn of(settings: &Settings) -> deliveries::Settings {
    let DeliverySettings { retry, max, max_per_rule_and_database, retention } = settings.deliveries.clone();
    let tries = settings.webhook.fast_retries.saturating_add(1);
    deliveries::Settings {
        patience: Patience {
            strategy: if retry.exponential { Strategy::Exponential } else { Strategy::Linear },
            delay: retry.delay,
            multiplier: retry.multiplier,
            cap: retry.cap,
            limit: retry.limit,
            give_up_after: retry.give_up_after,
        },
        bounds: Bounds { all: max, per_rule_and_database: max_per_rule_and_database },
        retention,
        assume_deleted_after: settings.db.assume_deleted_after,
        // As long as a delivery may take with its fast retries, and a while in its host's queue.
        lease: (settings.webhook.timeout + settings.webhook.retry_cap) * tries + Duration::from_secs(10),
        attempt_max: settings.webhook.timeout,
    }
}
