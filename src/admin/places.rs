//! Who has a place to ask from: connections, bounded in number and in age.
//!
//! A probe of `/live` must get in whatever else knocks. So nobody is kept out: where all places are taken, a new connection
//! gets the place of the oldest that has not asked anything, or else of the oldest.

use axum::serve::Listener;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// Probes, a scraper or two and a person: far below this.
pub const CONNECTIONS_MAX: usize = 256;
/// A connection is closed after this long, idle or not: one that reads a byte a minute must not hold a place. Scrapers reconnect.
pub const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);
/// A request's head is here within this, from the beginning or from the answer before.
pub const HEAD_MAX: Duration = Duration::from_secs(10);
const HEAD_END: &[u8] = b"\r\n\r\n";

pub struct BoundedListener {
    listener: TcpListener,
    places: Arc<Places>,
}

/// Those that are taken, the oldest first.
#[derive(Default)]
struct Places(Mutex<Taken>);

#[derive(Default)]
struct Taken {
    next: u64,
    by_age: BTreeMap<u64, Place>,
}

struct Place {
    /// No head of a request is here.
    is_silent: bool,
    end: CancellationToken,
}

impl Places {
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> (u64, CancellationToken) {
        let mut taken = self.taken();
        while taken.by_age.len() >= CONNECTIONS_MAX {
            let oldest_silent = taken.by_age.iter().find(|(_, place)| place.is_silent).map(|(id, _)| *id);
            let Some(id) = oldest_silent.or_else(|| taken.by_age.keys().next().copied()) else { break };
            if let Some(place) = taken.by_age.remove(&id) {
                place.end.cancel();
            }
        }
        let id = taken.next;
        taken.next += 1;
        let end = CancellationToken::new();
        taken.by_age.insert(id, Place { is_silent: true, end: end.clone() });
        (id, end)
    }

    fn set_silent(&self, id: u64, is_silent: bool) {
        if let Some(place) = self.taken().by_age.get_mut(&id) {
            place.is_silent = is_silent;
        }
    }
}

impl BoundedListener {
    pub fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::default() }
    }
}

impl Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedStream, SocketAddr) {
        // TcpListener's own `accept` retries by itself, with a pause where the process is out of file descriptors.
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        let (id, ended) = self.places.take();
        let end = async move {
            let _ = tokio::time::timeout(CONNECTION_AGE_MAX, ended.cancelled()).await;
        };
        let head = Head { is_awaited: true, deadline: Box::pin(tokio::time::sleep(HEAD_MAX)), matched: 0 };
        (BoundedStream { stream, end: Box::pin(end), has_ended: false, head, id, places: self.places.clone() }, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that holds one of the places, and ends at a certain age or for another's sake.
pub struct BoundedStream {
    stream: TcpStream,
    end: Pin<Box<dyn Future<Output = ()> + Send>>,
    head: Head,
    id: u64,
    places: Arc<Places>,
    has_ended: bool,
}

struct Head {
    is_awaited: bool,
    deadline: Pin<Box<Sleep>>,
    /// Bytes of its end that were read.
    matched: usize,
}

impl Head {
    /// True where it is here.
    fn read(&mut self, bytes: &[u8]) -> bool {
        for byte in bytes {
            self.matched = match HEAD_END.get(self.matched) == Some(byte) {
                true => self.matched + 1,
                // What breaks it off may begin it anew.
                false => usize::from(*byte == b'\r'),
            };
            if self.matched == HEAD_END.len() {
                self.is_awaited = false;
                self.matched = 0;
                return true;
            }
        }
        false
    }
}

impl Drop for BoundedStream {
    fn drop(&mut self) {
        self.places.taken().by_age.remove(&self.id);
    }
}

impl BoundedStream {
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        // A future that has ended must not be asked again, and the server may.
        self.has_ended |= !self.has_ended && self.end.as_mut().poll(context).is_ready();
        self.has_ended || (self.head.is_awaited && self.head.deadline.as_mut().poll(context).is_ready())
    }

    fn set_awaited(&mut self) {
        self.head.deadline.as_mut().reset(Instant::now() + HEAD_MAX);
        if !std::mem::replace(&mut self.head.is_awaited, true) {
            self.places.set_silent(self.id, true);
        }
    }
}

fn over() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the connection has had its time")
}

impl AsyncRead for BoundedStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_over(context) {
            return Poll::Ready(Err(over()));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let read = buffer.filled().get(before..).unwrap_or_default();
        if self.head.is_awaited && self.head.read(read) {
            self.places.set_silent(self.id, false);
        }
        polled
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_over(context) {
            return Poll::Ready(Err(over()));
        }
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        if matches!(polled, Poll::Ready(Ok(written)) if written > 0) {
            // An answer, or a part of one: the next request is awaited from its end.
            self.set_awaited();
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head() -> Head {
        Head { is_awaited: true, deadline: Box::pin(tokio::time::sleep(HEAD_MAX)), matched: 0 }
    }

    proptest! {
        #[test]
        fn a_heads_end_is_found_however_it_is_cut(text in "[ab\r\n]{0,24}", cut in 0usize..24) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _inside = runtime.enter();
            let mut head = head();
            let (one, other) = text.as_bytes().split_at(cut.min(text.len()));
            let found = head.read(one) || head.read(other);
            prop_assert_eq!(found, text.contains("\r\n\r\n"));
        }
    }

    #[test]
    fn a_new_one_takes_the_place_of_the_oldest_silent_one_and_then_of_the_oldest() {
        let places = Places::default();
        let ends: Vec<CancellationToken> = (0..CONNECTIONS_MAX).map(|_| places.take().1).collect();
        let asks = |id: u64| places.set_silent(id, false);
        asks(0);
        let (newest, _) = places.take();
        assert_eq!(ends.iter().position(CancellationToken::is_cancelled), Some(1), "the first asks something");
        (2..=newest).for_each(asks);
        places.take();
        assert!(ends[0].is_cancelled(), "all ask something");
        assert_eq!(ends.iter().filter(|end| end.is_cancelled()).count(), 2);
        assert_eq!(places.taken().by_age.len(), CONNECTIONS_MAX);
    }
}
