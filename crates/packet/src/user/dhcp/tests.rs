use proptest::prelude::*;

use super::*;
use crate::user::config::UserNetConfig;

fn server() -> DhcpServer {
    let config = UserNetConfig::default();
    DhcpServer::new(Addresses::of(&config), Some("guest".into()), config.mtu, true)
}

fn request(kind: DhcpMessageType, mac: u8, wanted: Option<Ipv4Addr>) -> Vec<u8> {
    let id = DhcpOption { kind: OPTION_CLIENT_ID, data: &[255, 1, 2, 3] };
    let options = [id];
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: 0x1234_5678,
        secs: 0,
        client_hardware_address: EthernetAddress([2, 0, 0, 0, 0, mac]),
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: wanted,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
    bytes
}

struct Got {
    kind: DhcpMessageType,
    ip: Ipv4Addr,
    to: MacAddress,
    options: Vec<(u8, Vec<u8>)>,
}

fn ask(server: &mut DhcpServer, message: &[u8]) -> Option<Got> {
    let reply = server.handle(message, &["lan.example".to_owned()])?;
    let packet = packet::Packet::parse(&reply.packet).unwrap();
    let (from, to, data) = packet::parse_udp(packet.payload).unwrap();
    assert_eq!((from, to), (67, 68));
    let dhcp = DhcpPacket::new_checked(data).unwrap();
    let repr = DhcpRepr::parse(&dhcp).unwrap();
    assert_eq!(repr.transaction_id, 0x1234_5678);
    let options = dhcp.options().map(|option| (option.kind, option.data.to_vec())).collect();
    Some(Got { kind: repr.message_type, ip: repr.your_ip, to: reply.mac, options })
}

#[test]
fn the_first_guest_is_15_and_stays_it() {
    let mut server = server();
    let offer = ask(&mut server, &request(DhcpMessageType::Discover, 1, None)).unwrap();
    assert_eq!((offer.kind, offer.ip), (DhcpMessageType::Offer, Ipv4Addr::new(10, 0, 2, 15)));
    assert_eq!(offer.to, MacAddress([2, 0, 0, 0, 0, 1]));
    let ack = ask(&mut server, &request(DhcpMessageType::Request, 1, Some(offer.ip))).unwrap();
    assert_eq!((ack.kind, ack.ip), (DhcpMessageType::Ack, offer.ip));
    let of = |kind| ack.options.iter().find(|(k, _)| *k == kind).map(|(_, data)| data.as_slice());
    assert_eq!(of(1), Some(&[255, 255, 255, 0][..]));
    assert_eq!(of(3), Some(&[10, 0, 2, 2][..]));
    assert_eq!(of(6), Some(&[10, 0, 2, 3][..]));
    assert_eq!(of(12), Some(&b"guest"[..]));
    assert_eq!(of(15), Some(&b"lan.example"[..]));
    assert_eq!(of(26), Some(&65520u16.to_be_bytes()[..]));
    assert_eq!(of(61), Some(&[255, 1, 2, 3][..]));
    assert_eq!(of(119), Some(&b"\x03lan\x07example\x00"[..]));
    let second = ask(&mut server, &request(DhcpMessageType::Discover, 2, None)).unwrap();
    assert_eq!(second.ip, Ipv4Addr::new(10, 0, 2, 16));
}

#[test]
fn wrong_requests_get_a_nak_and_old_leases_an_ack() {
    let mut server = server();
    ask(&mut server, &request(DhcpMessageType::Discover, 1, None)).unwrap();
    for wanted in [Ipv4Addr::new(192, 168, 1, 5), Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(10, 0, 2, 16)] {
        let got = ask(&mut server, &request(DhcpMessageType::Request, 1, Some(wanted))).unwrap();
        assert_eq!((got.kind, got.to), (DhcpMessageType::Nak, MacAddress::BROADCAST), "{wanted}");
        assert!(got.options.iter().all(|(kind, _)| [53, 54, 61].contains(kind)));
    }
    let old = Ipv4Addr::new(10, 0, 2, 99);
    assert_eq!(ask(&mut server, &request(DhcpMessageType::Request, 7, Some(old))).unwrap().ip, old);
    assert!(ask(&mut server, &request(DhcpMessageType::Release, 7, None)).is_none());
    assert_eq!(ask(&mut server, &request(DhcpMessageType::Request, 8, Some(old))).unwrap().ip, old);
}

#[test]
fn more_guests_than_addresses_take_the_oldest() {
    let mut server = server();
    for mac in 0..=255 {
        let got = ask(&mut server, &request(DhcpMessageType::Discover, mac, None)).unwrap();
        assert!(server.is_for_guests(got.ip));
    }
    assert_eq!(server.leases.len(), 240);
}

proptest! {
    #[test]
    fn mutated_messages_do_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40), cut: prop::sample::Index) {
        let mut server = server();
        let mut message = request(DhcpMessageType::Discover, 1, None);
        for (index, value) in changes {
            let at = index.index(message.len());
            message[at] = value;
        }
        message.truncate(cut.index(message.len() + 1));
        server.handle(&message, &[]);
        prop_assert!(server.leases.len() <= 1);
    }
}
