//! What the tests stand on: servers, the process under test, a receiver of webhooks, a proxy that misbehaves.

pub mod couch;
pub mod lab;
pub mod original;
pub mod port;
pub mod process;
pub mod proxy;
pub mod receiver;
pub mod server;
pub mod wait;

pub use couch::Couch;
pub use lab::Lab;
pub use port::OwnPort;
pub use process::Spiegel;
pub use proxy::{Fault, Proxy};
pub use receiver::{Answer, Receiver, Request};
pub use server::{Kind, Server};
pub use wait::{SOON, eventually, stays};

/// Makes tests of async functions that take a lab: `embedded::…`, `pouchdb::…`, `couchdb::…`. A server that is not there is
/// passed over with a line that says so.
///
/// `every`: on every server. `private`: only on those that belong to the test alone, because it would disturb others.
/// `like_couchdb`: not on PouchDB. `embedded`: for what only the embedded server can be told to do. `couchdb`: for what needs its
/// JavaScript or its users.
macro_rules! tests_on {
    (
        every: [$($every:ident),* $(,)?]
        $(, private: [$($private:ident),* $(,)?])?
        $(, like_couchdb: [$($like:ident),* $(,)?])?
        $(, embedded: [$($embedded:ident),* $(,)?])?
        $(, couchdb: [$($couchdb:ident),* $(,)?])?
        $(,)?
    ) => {
        mod embedded {
            $crate::support::each_on!(Embedded: $($every)* $($($private)*)? $($($like)*)? $($($embedded)*)?);
        }
        mod pouchdb {
            $crate::support::each_on!(PouchDb: $($every)* $($($private)*)?);
        }
        mod couchdb {
            $crate::support::each_on!(CouchDb: $($every)* $($($like)*)? $($($couchdb)*)?);
        }
    };
}

macro_rules! each_on {
    ($kind:ident: $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $crate::support::lab::run($crate::support::Kind::$kind, stringify!($name), super::$name);
            }
        )*
    };
}

pub(crate) use {each_on, tests_on};
