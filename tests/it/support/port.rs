//! A port that stays ours also while nobody listens on it. The number of a listener that was closed is given to whoever asks
//! the kernel for a free port next, often to the server of a test that runs beside this one.

use std::net::{Ipv4Addr, SocketAddr};
use tokio::net::{TcpListener, TcpSocket};

pub struct OwnPort {
    pub number: u16,
    /// Bound and never listening: the kernel refuses what connects to it.
    _held: TcpSocket,
}

impl OwnPort {
    pub fn new() -> Self {
        let held = bound(0);
        let number = held.local_addr().expect("an address").port();
        Self { number, _held: held }
    }

    /// Refuses again when the listener is dropped.
    pub fn listen(&self) -> TcpListener {
        bound(self.number).listen(1024).expect("nobody else listens on our own port")
    }
}

/// SO_REUSEPORT lets the listener share the number with the socket that holds it; the kernel gives such a number to nobody who
/// asks for a free one.
fn bound(port: u16) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseport(true).expect("SO_REUSEPORT");
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).expect("a free port, or our own");
    socket
}

#[tokio::test]
async fn a_port_of_our_own_refuses_unless_we_listen() {
    let port = OwnPort::new();
    let connect = async || tokio::net::TcpStream::connect(("127.0.0.1", port.number)).await.map(drop);
    for _ in 0..3 {
        assert_eq!(connect().await.expect_err("nobody listens").kind(), std::io::ErrorKind::ConnectionRefused);
        let listener = port.listen();
        connect().await.expect("an answer");
        drop(listener);
    }
    let other = std::net::TcpListener::bind(("127.0.0.1", port.number));
    assert_eq!(other.expect_err("ours").kind(), std::io::ErrorKind::AddrInUse);
}
