//! Tap devices, in a network namespace of the test's own. Named as skipped where that is not allowed.
#![allow(unsafe_code)]

mod guest;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread,
};

use guest::{ALL_OFFLOADS, Guest, NO_OFFLOADS, Setup, pattern, private};
use vireo_packet::{Backend, NetError, Tap};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

#[test]
fn names_that_cannot_be() {
    for name in ["", "a-name-of-16-char", "a/b", "a b", "..", "tap%d"] {
        let error = Tap::open(name).unwrap_err();
        assert!(matches!(&error, NetError::TapName(n) if n == name), "{error}");
    }
}

#[test]
fn errors_name_the_device_and_the_reason() {
    if !private::enter("tap::errors_name_the_device_and_the_reason") {
        return;
    }
    assert!(!Tap::exists("vireo-t0").unwrap());
    let _open = Tap::open("vireo-t0").unwrap();
    assert!(Tap::exists("vireo-t0").unwrap());
    let error = Tap::open("vireo-t0").unwrap_err();
    assert!(matches!(&error, NetError::TapBusy(name) if name == "vireo-t0"), "{error}");
    let error = Tap::open("lo").unwrap_err();
    assert!(matches!(&error, NetError::NotATap(name) if name == "lo"), "{error}");
}

#[test]
fn tcp_to_the_kernel_with_and_without_offloads() {
    if !private::enter("tap::tcp_to_the_kernel_with_and_without_offloads") {
        return;
    }
    for (name, offloads, mtu) in
        [("vireo-t1", NO_OFFLOADS, 1500), ("vireo-t2", ALL_OFFLOADS, 1500), ("vireo-t3", ALL_OFFLOADS, 9000)]
    {
        let tap = Tap::open(name).unwrap();
        private::set_mtu(name, mtu);
        private::add_v4(name, HOST, MASK);
        private::up(name);
        assert_eq!(tap.mtu(), Some(mtu as u16));
        let listener = TcpListener::bind((HOST, 7)).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = stream.try_clone().unwrap();
            let all = thread::spawn(move || {
                let mut all = Vec::new();
                reader.read_to_end(&mut all).unwrap();
                all
            });
            stream.write_all(&pattern(2_000_000, 1)).unwrap();
            all.join().unwrap()
        });
        let addresses = vec!["10.9.8.2/24".parse().unwrap()];
        let mut guest = Guest::with(tap.clone(), Setup { offloads, mtu: mtu as usize, addresses, ..Setup::default() });
        let handle = guest.connect(SocketAddr::new(HOST.into(), 7));
        guest.established(handle);
        assert!(guest.read_all(handle, 2_000_000) == pattern(2_000_000, 1));
        assert_eq!(guest.nic.segmented > 0, offloads.segmentation_out, "{name}");
        let data = pattern(2_000_000, 2);
        guest.send_all(handle, &data);
        guest.tcp(handle).close();
        guest.until("the end", |_| server.is_finished().then_some(()));
        assert!(server.join().unwrap() == data, "{name}");
    }
}

#[test]
fn a_frame_beyond_the_buffers_is_dropped() {
    use std::io::{IoSlice, IoSliceMut};
    if !private::enter("tap::a_frame_beyond_the_buffers_is_dropped") {
        return;
    }
    let tap = Tap::open("vireo-t4").unwrap();
    private::add_v4("vireo-t4", HOST, MASK);
    private::up("vireo-t4");
    // The kernel asks for us by ARP: a frame of 12 + 42 bytes.
    let socket = std::net::UdpSocket::bind((HOST, 0)).unwrap();
    socket.send_to(b"x", "10.9.8.2:9").unwrap();
    let mut large = [0; 100];
    loop {
        assert!(guest::wait_readable(&*tap, std::time::Duration::from_secs(5)));
        let length = tap.recv(&mut [IoSliceMut::new(&mut large)]).unwrap().unwrap();
        if large[24..26] == [8, 6] {
            assert_eq!(length, 54);
            break;
        }
    }
    // It asks again; this time there is no room for it.
    assert!(guest::wait_readable(&*tap, std::time::Duration::from_secs(5)));
    let (mut one, mut two) = ([0; 30], [0; 23]);
    assert_eq!(tap.recv(&mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)]).unwrap(), None);
    // A frame that is none, or in many pieces, harms nobody.
    tap.send(&[IoSlice::new(&[0; 5])]).unwrap();
    let byte = [0];
    tap.send(&vec![IoSlice::new(&byte); 1500]).unwrap();
}
