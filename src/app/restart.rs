//! What a child's end means: the pure core of the Supervisor.

use crate::config::Role;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The children of the Supervisor, in the order in which they are started: each needs only those above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Child {
    CouchHealth,
    Rules,
    Checkpoints,
    DeliveryStore,
    WebhookPool,
    Deliveries,
    ReplicatorPool,
    Topology,
    DbDirectory,
    Workers,
    /// Stands where the topology and the directory stand in a process that does everything.
    UpdateListener,
    GlobalChanges,
}

impl Child {
    pub const ALL: [Child; 12] = [
        Child::CouchHealth,
        Child::Rules,
        Child::Checkpoints,
        Child::DeliveryStore,
        Child::WebhookPool,
        Child::Deliveries,
        Child::ReplicatorPool,
        Child::Topology,
        Child::DbDirectory,
        Child::Workers,
        Child::UpdateListener,
        Child::GlobalChanges,
    ];

    /// Those of a process with this role, in their order.
    pub fn all_of(role: Role) -> Vec<Child> {
        use Child::*;
        let is_of = |child: &Child| match role {
            Role::UpdateListener => matches!(child, CouchHealth | Rules | Checkpoints | UpdateListener | GlobalChanges),
            Role::ChangeListener => {
                matches!(child, CouchHealth | Rules | Checkpoints | DeliveryStore | WebhookPool | Deliveries | Workers)
            }
            Role::Replicator => matches!(child, CouchHealth | Rules | Checkpoints | ReplicatorPool | Workers),
            Role::Everything => *child != UpdateListener,
        };
        Self::ALL.into_iter().filter(is_of).collect()
    }

    /// Whose handles it holds. CouchHealth and Rules publish through channels that the Supervisor owns, so nobody needs them.
    pub fn needs(self) -> &'static [Child] {
        match self {
            Child::CouchHealth | Child::Rules => &[],
            Child::Checkpoints | Child::DeliveryStore | Child::WebhookPool | Child::ReplicatorPool => &[],
            Child::Deliveries => &[Child::DeliveryStore, Child::WebhookPool],
            Child::Topology => &[Child::Checkpoints, Child::ReplicatorPool],
            Child::DbDirectory => &[Child::Checkpoints, Child::DeliveryStore, Child::WebhookPool, Child::Topology],
            Child::Workers => {
                &[Child::Checkpoints, Child::DeliveryStore, Child::WebhookPool, Child::ReplicatorPool, Child::DbDirectory]
            }
            Child::UpdateListener => &[Child::Checkpoints],
            Child::GlobalChanges => &[Child::Checkpoints, Child::Topology, Child::DbDirectory, Child::UpdateListener],
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Child::CouchHealth => "couch_health",
            Child::Rules => "rules",
            Child::Checkpoints => "checkpoints",
            Child::DeliveryStore => "delivery_store",
            Child::WebhookPool => "webhook_pool",
            Child::Deliveries => "deliveries",
            Child::ReplicatorPool => "replicator_pool",
            Child::Topology => "topology",
            Child::DbDirectory => "db_directory",
            Child::Workers => "workers",
            Child::UpdateListener => "update_listener",
            Child::GlobalChanges => "global_changes",
        }
    }
}

/// The failed child and all that need it, directly or not, in the order in which they are started.
pub fn to_rebuild(failed: Child, role: Role) -> Vec<Child> {
    let mut rebuild = vec![failed];
    for child in Child::all_of(role) {
        if child != failed && child.needs().iter().any(|need| rebuild.contains(need)) {
            rebuild.push(child);
        }
    }
    rebuild
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    RestartAfter(Duration),
    /// Too many in the window: the process ends, and whatever runs it starts it anew.
    Escalate,
}

/// Restarts so far.
#[derive(Debug, Default)]
pub struct Restarts {
    recent: VecDeque<Instant>,
}

/// More than this many in a window is no accident.
pub const RESTARTS_MAX: usize = 10;
pub const WINDOW: Duration = Duration::from_secs(60);

impl Restarts {
    pub fn decide(&mut self, now: Instant) -> Decision {
        while self.recent.front().is_some_and(|at| now.saturating_duration_since(*at) > WINDOW) {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        match self.recent.len() {
            // The first is restarted nearly at once: most crashes do not repeat.
            1 => Decision::RestartAfter(Duration::from_millis(50)),
            n if n <= RESTARTS_MAX => {
                Decision::RestartAfter(Duration::from_millis(100 << (n - 2).min(5)).min(Duration::from_secs(3)))
            }
            _ => Decision::Escalate,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_child_takes_only_those_that_need_it() {
        use Child::*;
        let cases: [(Child, &[Child]); 7] = [
            (CouchHealth, &[CouchHealth]),
            (Rules, &[Rules]),
            (WebhookPool, &[WebhookPool, Deliveries, DbDirectory, Workers, GlobalChanges]),
            (Deliveries, &[Deliveries]),
            (ReplicatorPool, &[ReplicatorPool, Topology, DbDirectory, Workers, GlobalChanges]),
            (DbDirectory, &[DbDirectory, Workers, GlobalChanges]),
            (GlobalChanges, &[GlobalChanges]),
        ];
        for (failed, expected) in cases {
            assert_eq!(to_rebuild(failed, Role::Everything), expected, "{failed:?}");
        }
        assert_eq!(to_rebuild(Checkpoints, Role::Replicator), [Checkpoints, Workers]);
        assert_eq!(to_rebuild(Checkpoints, Role::UpdateListener), [Checkpoints, UpdateListener, GlobalChanges]);
    }

    #[test]
    fn every_child_needs_only_those_started_before_it() {
        for (index, child) in Child::ALL.iter().enumerate() {
            for need in child.needs() {
                assert!(Child::ALL[..index].contains(need), "{child:?} needs {need:?}");
            }
        }
    }

    #[test]
    fn restarts_back_off_and_escalate_only_within_the_window() {
        let start = Instant::now();
        let mut restarts = Restarts::default();
        let mut last = Duration::ZERO;
        for n in 0..RESTARTS_MAX {
            match restarts.decide(start + Duration::from_millis(n as u64)) {
                Decision::RestartAfter(delay) => {
                    assert!(delay >= last && delay <= Duration::from_secs(3));
                    last = delay;
                }
                Decision::Escalate => panic!("escalated after {n} restarts"),
            }
        }
        assert_eq!(restarts.decide(start + Duration::from_secs(1)), Decision::Escalate);
        assert!(matches!(restarts.decide(start + WINDOW * 3), Decision::RestartAfter(_)));
    }
}
