//! A network of one's own for a test: what is sent there reaches nobody.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
};

use socket2::{Domain, Socket, Type};

#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

fn request(name: &str, value: &[u8]) -> InterfaceRequest {
    let mut request = InterfaceRequest { name: [0; 16], value: [0; 24] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    request.value[..value.len()].copy_from_slice(value);
    request
}

fn ioctl<T>(domain: Domain, number: libc::c_ulong, argument: &mut T) {
    let socket = Socket::new(domain, Type::DGRAM, None).unwrap();
    // SAFETY: every caller passes the structure that its request takes.
    let result = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), number, argument as *mut T) };
    assert!(result >= 0, "ioctl {number:#x}: {}", io::Error::last_os_error());
}

/// Moves this thread, and those that it starts from now on, into a new network namespace with a loopback interface
/// only. False, with a word about it, where that takes root.
pub fn enter(test: &str) -> bool {
    // SAFETY: this changes the calling thread's network only.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        eprintln!("SKIPPED {test}: a network namespace takes root ({})", io::Error::last_os_error());
        return false;
    }
    up("lo");
    true
}

pub fn up(name: &str) {
    let mut request = request(name, &[]);
    ioctl(Domain::IPV4, libc::SIOCGIFFLAGS, &mut request);
    request.value[0] |= libc::IFF_UP as u8;
    ioctl(Domain::IPV4, libc::SIOCSIFFLAGS, &mut request);
}

fn socket_address(address: Ipv4Addr) -> Vec<u8> {
    [&(libc::AF_INET as u16).to_ne_bytes()[..], &[0, 0], &address.octets()].concat()
}

/// Gives an interface (or an alias such as `lo:1`) an address.
pub fn add_v4(name: &str, address: Ipv4Addr, mask: Ipv4Addr) {
    ioctl(Domain::IPV4, libc::SIOCSIFADDR, &mut request(name, &socket_address(address)));
    ioctl(Domain::IPV4, libc::SIOCSIFNETMASK, &mut request(name, &socket_address(mask)));
}

#[repr(C)]
struct AddressRequest6 {
    address: [u8; 16],
    prefix: u32,
    interface: i32,
}

pub fn add_v6(name: &str, address: Ipv6Addr, prefix: u32) {
    let mut index = request(name, &[]);
    ioctl(Domain::IPV4, libc::SIOCGIFINDEX, &mut index);
    let interface = i32::from_ne_bytes(index.value[..4].try_into().unwrap());
    let mut request = AddressRequest6 { address: address.octets(), prefix, interface };
    ioctl(Domain::IPV6, libc::SIOCSIFADDR, &mut request);
}

pub fn set_mtu(name: &str, mtu: i32) {
    ioctl(Domain::IPV4, libc::SIOCSIFMTU, &mut request(name, &mtu.to_ne_bytes()));
}

/// Lets everybody in this namespace have ping sockets.
pub fn allow_ping_sockets() {
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
}

/// The default route of this namespace.
pub fn add_default_route(gateway: Ipv4Addr) {
    let address = |ip: Ipv4Addr| {
        let bytes: [u8; 16] = [socket_address(ip), vec![0; 8]].concat().try_into().unwrap();
        // SAFETY: both are 16 bytes of plain data, of the same layout.
        unsafe { std::mem::transmute::<[u8; 16], libc::sockaddr>(bytes) }
    };
    // SAFETY: all-zero is a valid value of this C structure.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ioctl(Domain::IPV4, libc::SIOCADDRT, &mut route);
}
