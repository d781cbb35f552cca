//! The host's own resolvers, from its resolv.conf.

use std::{
    ffi::CString,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

const PORT: u16 = 53;
/// glibc looks at no more than three either.
const MAX_SERVERS: usize = 3;
/// How often the file is looked at, at most.
const CHECK_EVERY: Duration = Duration::from_secs(1);
const LARGEST_FILE: u64 = 64 << 10;

pub(crate) struct Resolver {
    path: PathBuf,
    fixed_servers: Option<Vec<SocketAddr>>,
    fixed_domains: Option<Vec<String>>,
    found: Found,
    modified: Option<SystemTime>,
    checked: Option<Instant>,
    /// The server that answered last.
    preferred: usize,
}

/// What a resolv.conf says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    servers: Vec<SocketAddr>,
    domains: Vec<String>,
}

impl Resolver {
    pub(crate) fn new(path: PathBuf, servers: Option<Vec<SocketAddr>>, domains: Option<Vec<String>>) -> Self {
        Self {
            path,
            fixed_servers: servers,
            fixed_domains: domains,
            found: Found::default(),
            modified: None,
            checked: None,
            preferred: 0,
        }
    }

    /// The servers to ask, the preferred one first. Never empty.
    pub(crate) fn servers(&mut self, now: Instant) -> Vec<SocketAddr> {
        self.refresh(now);
        let mut servers = self.fixed_servers.as_ref().unwrap_or(&self.found.servers).clone();
        if servers.is_empty() {
            // resolv.conf(5): without one it is the local host.
            servers.push((Ipv4Addr::LOCALHOST, PORT).into());
        }
        let preferred = self.preferred % servers.len();
        servers.rotate_left(preferred);
        servers
    }

    pub(crate) fn search_domains(&mut self, now: Instant) -> Vec<String> {
        self.refresh(now);
        self.fixed_domains.as_ref().unwrap_or(&self.found.domains).clone()
    }

    /// This server did not answer: ask the next one first from now on, unless that was decided already.
    pub(crate) fn failed(&mut self, server: SocketAddr, now: Instant) {
        if self.servers(now).first() == Some(&server) {
            self.preferred = self.preferred.wrapping_add(1);
        }
    }

    fn refresh(&mut self, now: Instant) {
        if self.checked.is_some_and(|checked| now < checked + CHECK_EVERY) {
            return;
        }
        self.checked = Some(now);
        let metadata = fs::metadata(&self.path).ok();
        let modified = metadata.as_ref().and_then(|m| m.modified().ok());
        if modified.is_some() && modified == self.modified {
            return;
        }
        self.modified = modified;
        self.preferred = 0;
        self.found = match metadata.filter(|m| m.len() <= LARGEST_FILE).map(|_| fs::read(&self.path)) {
            Some(Ok(text)) => parse(&String::from_utf8_lossy(&text)),
            _ => Found::default(),
        };
    }
}

fn parse(text: &str) -> Found {
    let mut found = Found::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") if found.servers.len() < MAX_SERVERS => {
                found.servers.extend(words.next().and_then(parse_server))
            }
            // The last of these lines counts.
            Some("search" | "domain") => found.domains = words.filter(|word| *word != ".").map(str::to_owned).collect(),
            _ => {}
        }
    }
    found
}

fn parse_server(word: &str) -> Option<SocketAddr> {
    if let Some((address, zone)) = word.split_once('%') {
        return Some(SocketAddrV6::new(address.parse().ok()?, PORT, 0, interface_index(zone)?).into());
    }
    let address: IpAddr = word.parse().ok()?;
    Some(SocketAddr::new(address, PORT))
}

fn interface_index(zone: &str) -> Option<u32> {
    if let Ok(index) = zone.parse() {
        return Some(index);
    }
    let name = CString::new(zone).ok()?;
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_everything() {
        let found = parse(
            "# comment\nnameserver 127.0.0.53 # local\nnameserver fe80::1%lo\nnameserver nonsense\n\
             domain old\nsearch lan example.org .\noptions edns0\nnameserver ::1\nnameserver 9.9.9.9\n",
        );
        assert_eq!(found.servers[0], "127.0.0.53:53".parse().unwrap());
        assert!(matches!(found.servers[1], SocketAddr::V6(a) if a.scope_id() == 1), "{found:?}");
        assert_eq!(found.servers.len(), 3);
        assert_eq!(found.domains, ["lan", "example.org"]);
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let path = std::env::temp_dir().join(format!("vireo-resolv-{}", std::process::id()));
        let mut resolver = Resolver::new(path.clone(), None, None);
        let start = Instant::now();
        assert_eq!(resolver.servers(start), ["127.0.0.1:53".parse().unwrap()]);
        fs::write(&path, "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        assert_eq!(resolver.servers(start), ["127.0.0.1:53".parse().unwrap()], "not looked at that often");
        let later = start + CHECK_EVERY;
        assert_eq!(resolver.servers(later), ["192.0.2.1:53".parse().unwrap(), "192.0.2.2:53".parse().unwrap()]);
        for _ in 0..3 {
            resolver.failed("192.0.2.1:53".parse().unwrap(), later);
            assert_eq!(resolver.servers(later)[0], "192.0.2.2:53".parse().unwrap());
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(resolver.servers(later + CHECK_EVERY), ["127.0.0.1:53".parse().unwrap()]);
    }
}
