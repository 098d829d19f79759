//! Which addresses a webhook may go to, with `webhook.block_private_networks` on.
//!
//! It judges addresses and not names. It is the client's resolver: what it lets through is what is connected to, so that a
//! name cannot lead elsewhere between the check and the connection. Addresses that stand in a URL never reach a
//! resolver, and are checked before the request. There is no other way to an address: redirects are not followed, and no
//! proxy is used.

use futures_util::future::BoxFuture;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use url::{Host, Url};

/// Name ▶ addresses. The system's, but for tests.
pub type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, std::io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// Without the address: it may be nobody's business what a name means inside.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{host} is at an address that webhook.block_private_networks forbids")]
pub struct Blocked {
    host: String,
}

pub struct Guard {
    allowed: Arc<[IpNet]>,
    lookup: Lookup,
}

impl Guard {
    pub fn new(allowed: &[IpNet], lookup: Lookup) -> Self {
        Self { allowed: allowed.into(), lookup }
    }

    /// Of a URL with an address for its host; names are checked when they are looked up.
    pub fn check(&self, url: &Url) -> Result<(), Blocked> {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        match permits(&self.allowed, address) {
            true => Ok(()),
            false => Err(Blocked { host: address.to_string() }),
        }
    }
}

impl Resolve for Guard {
    /// Those of a name's addresses that may be reached.
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_string();
        let (found, allowed) = ((self.lookup)(host.clone()), self.allowed.clone());
        Box::pin(async move {
            let mut addresses = found.await?;
            let any = !addresses.is_empty();
            addresses.retain(|address| permits(&allowed, address.ip()));
            match addresses.is_empty() && any {
                true => Err(Blocked { host }.into()),
                false => Ok(Box::new(addresses.into_iter()) as Addrs),
            }
        })
    }
}

fn permits(allowed: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    !is_private(address) || allowed.iter().any(|network| network.contains(&address))
}

pub fn system_lookup() -> Lookup {
    Arc::new(|host| Box::pin(async move { Ok(tokio::net::lookup_host((host.as_str(), 0)).await?.collect()) }))
}

/// What the guard said, wherever it stands among an error's causes.
pub fn blocked_in<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Blocked> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(blocked) = error.downcast_ref::<Blocked>() {
            return Some(blocked);
        }
        cause = error.source();
    }
    None
}

const fn v4(a: u8, b: u8, c: u8, d: u8, bits: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), bits)
}

/// IANA's special-purpose registry, and what clouds answer their machines on.
const PRIVATE_V4: [Ipv4Net; 17] = [
    v4(0, 0, 0, 0, 8),        // this network
    v4(10, 0, 0, 0, 8),       // private
    v4(100, 64, 0, 0, 10),    // carriers' NAT, and Alibaba's metadata
    v4(127, 0, 0, 0, 8),      // loopback
    v4(168, 63, 129, 16, 32), // Azure's platform
    v4(169, 254, 0, 0, 16),   // link-local, and everybody's metadata
    v4(172, 16, 0, 0, 12),    // private
    v4(192, 0, 0, 0, 24),     // protocol assignments, and Oracle's metadata
    v4(192, 0, 2, 0, 24),     // documentation
    v4(192, 31, 196, 0, 24),  // AS112
    v4(192, 88, 99, 0, 24),   // 6to4 relays
    v4(192, 168, 0, 0, 16),   // private
    v4(198, 18, 0, 0, 15),    // benchmarks
    v4(198, 51, 100, 0, 24),  // documentation
    v4(203, 0, 113, 0, 24),   // documentation
    v4(224, 0, 0, 0, 4),      // multicast
    v4(240, 0, 0, 0, 4),      // reserved, and broadcast
];

const fn v6(a: u16, b: u16, c: u16, bits: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), bits)
}

/// Everything else is loopback, link-local, unique local, multicast, or nobody's yet.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 0, 3);
/// Within it: protocol assignments (Teredo among them), documentation.
const PRIVATE_V6: [Ipv6Net; 3] = [v6(0x2001, 0, 0, 23), v6(0x2001, 0xdb8, 0, 32), v6(0x3fff, 0, 0, 20)];
/// Addresses that lead to the IPv4 address inside them, and where it stands.
const NAT64: Ipv6Net = v6(0x64, 0xff9b, 0, 96);
const SIX_TO_FOUR: Ipv6Net = v6(0x2002, 0, 0, 16);

/// True for each address that is not of the public internet, also where it is wrapped in another.
pub fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => PRIVATE_V4.iter().any(|network| network.contains(&address)),
        IpAddr::V6(address) if NAT64.contains(&address) => is_private(embedded(address, 12)),
        IpAddr::V6(address) if SIX_TO_FOUR.contains(&address) => is_private(embedded(address, 2)),
        IpAddr::V6(address) => !GLOBAL_V6.contains(&address) || PRIVATE_V6.iter().any(|network| network.contains(&address)),
    }
}

fn embedded(address: Ipv6Addr, at: usize) -> IpAddr {
    let mut bytes = [0; 4];
    bytes.iter_mut().zip(address.octets().into_iter().skip(at)).for_each(|(to, from)| *to = from);
    IpAddr::V4(Ipv4Addr::from(bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::str::FromStr;

    #[test]
    fn what_is_not_of_the_internet_is_private() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.255.255",
            "168.63.129.16",
            "169.254.169.254",
            "169.254.170.2",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.31.196.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:10.0.0.1",
            "::ffff:0:1.2.3.4",
            "64:ff9b::127.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:0:1::1",
            "2001:10::1",
            "2001:20::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
            "2002:a9fe:a9fe::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fd12:3456::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "ff0e::1",
            "4000::1",
        ] {
            assert!(is_private(IpAddr::from_str(address).expect(address)), "{address}");
        }
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.1",
            "168.63.129.17",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2606:4700:4700::1111",
            "2a00:1450::1",
            "3ffe::1",
        ] {
            assert!(!is_private(IpAddr::from_str(address).expect(address)), "{address}");
        }
    }

    #[test]
    fn an_address_in_a_url_is_checked_however_it_is_spelled() {
        let guard = Guard::new(&["10.1.0.0/16".parse().unwrap()], system_lookup());
        for url in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://127.0.0.1./",
            "http://[::1]:8080/",
            "http://[::ffff:7f00:1]/",
            "http://[64:ff9b::7f00:1]/",
            "https://10.2.0.1/",
            "http://0/",
            "http://①②⑦.0.0.1/",
        ] {
            assert!(guard.check(&url.parse().expect(url)).is_err(), "{url}");
        }
        for url in [
            "http://10.1.2.3/",
            "http://[::ffff:10.1.2.3]/",
            "http://8.8.8.8/",
            "http://[2606:4700:4700::1111]/",
            "http://localhost/",
        ] {
            assert!(guard.check(&url.parse().expect(url)).is_ok(), "{url}");
        }
    }

    #[tokio::test]
    async fn of_a_name_s_addresses_only_those_that_may_be_reached_are_left() {
        let lookup: Lookup = Arc::new(|host| {
            Box::pin(async move {
                let addresses: &[&str] = match host.as_str() {
                    "mixed" => &["127.0.0.1:0", "8.8.8.8:0", "[::1]:0", "[fd00::1]:0"],
                    "inside" => &["169.254.169.254:0", "[::ffff:10.0.0.1]:0"],
                    "nowhere" => &[],
                    _ => return Err(std::io::Error::other("no such name")),
                };
                Ok(addresses.iter().map(|address| address.parse().unwrap()).collect())
            })
        });
        let guard = Guard::new(&["fd00::/8".parse().unwrap()], lookup);
        let resolve = async |name: &str| {
            guard.resolve(name.parse().unwrap()).await.map(|found| found.map(|a| a.ip().to_string()).collect::<Vec<_>>())
        };
        assert_eq!(resolve("mixed").await.expect("two are left"), ["8.8.8.8", "fd00::1"]);
        let error = resolve("inside").await.expect_err("none is left");
        let blocked = blocked_in(error.as_ref()).expect("the guard's word");
        assert!(blocked.to_string().contains("inside") && !blocked.to_string().contains("169"), "{blocked}");
        assert!(resolve("nowhere").await.expect("nothing to forbid").is_empty());
        assert!(blocked_in(resolve("unknown").await.expect_err("no such name").as_ref()).is_none());
    }

    proptest! {
        #[test]
        fn an_address_wrapped_in_another_is_as_private_as_it_is(bits: u32) {
            let inner = Ipv4Addr::from(bits);
            let [a, b, c, d] = inner.octets();
            let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            let expected = is_private(IpAddr::V4(inner));
            let wrapped = [
                inner.to_ipv6_mapped(),
                Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
                Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
            ];
            for address in wrapped {
                prop_assert_eq!(is_private(IpAddr::V6(address)), expected, "{}", address);
            }
        }

        #[test]
        fn what_the_standard_library_calls_private_is(bits: u32) {
            let address = Ipv4Addr::from(bits);
            let known = address.is_private() || address.is_loopback() || address.is_link_local() || address.is_multicast()
                || address.is_unspecified() || address.is_broadcast() || address.is_documentation();
            prop_assert!(!known || is_private(IpAddr::V4(address)), "{}", address);
        }
    }
}
