use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::{
    conformance::{self, Op, Subject},
    fake_pin::FakePin,
};

/// Keeps what is written; blocks while `stuck`, fails if `broken`.
#[derive(Clone, Default)]
struct Sink {
    bytes: Arc<Mutex<Vec<u8>>>,
    writes: Arc<AtomicUsize>,
    stuck: Arc<Mutex<()>>,
    broken: bool,
}

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        drop(self.stuck.lock().unwrap());
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.writes.fetch_add(1, Ordering::SeqCst);
        self.bytes.lock().unwrap().extend(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Rig {
    pin: Arc<FakePin>,
    serial: Serial,
}

impl Rig {
    fn new(sink: Option<&Sink>) -> Self {
        let pin = FakePin::new();
        let output = sink.map(|sink| Box::new(sink.clone()) as Box<dyn Write + Send>);
        Self { serial: Serial::new(pin.line(), output).unwrap(), pin }
    }

    fn get(&self, offset: u16) -> u8 {
        self.serial.read_port(offset)
    }

    fn set(&self, offset: u16, value: u8) {
        self.serial.write_port(offset, value);
    }

    fn level(&self) -> bool {
        self.pin.level()
    }

    fn edges(&self) -> usize {
        self.pin.edges()
    }
}

#[test]
fn output_arrives_in_few_writes() {
    let sink = Sink::default();
    let rig = Rig::new(Some(&sink));
    let text: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
    for byte in &text {
        assert_ne!(rig.get(5) & 0x20, 0);
        rig.set(0, *byte);
    }
    assert!(rig.serial.flush(Duration::from_secs(10)));
    assert_eq!(*sink.bytes.lock().unwrap(), text);
    let writes = sink.writes.load(Ordering::SeqCst);
    assert!(writes < 500, "{writes} writes for 20000 bytes");
    // the last words come out too
    rig.set(0, b'!');
    drop(rig);
    assert_eq!(sink.bytes.lock().unwrap().last(), Some(&b'!'));
}

#[test]
fn a_stuck_reader_makes_the_transmitter_busy_and_nothing_else() {
    let sink = Sink::default();
    let rig = Rig::new(Some(&sink));
    rig.set(1, 2);
    let stuck = sink.stuck.lock().unwrap();
    let mut sent = 0;
    while rig.get(5) & 0x20 != 0 {
        rig.set(0, b'x');
        sent += 1;
        assert!(sent <= 3 * OUTPUT_BYTES, "no end");
    }
    rig.get(2);
    assert!(!rig.level(), "no transmitter interrupt while busy");
    let edges = rig.edges();
    rig.set(0, b'y');
    drop(stuck);
    assert!(rig.serial.flush(Duration::from_secs(10)));
    assert_eq!(rig.get(5) & 0x60, 0x60);
    assert!(rig.level() && rig.edges() > edges, "ready again");
    let bytes = sink.bytes.lock().unwrap();
    assert!(bytes.len() == sent && bytes.iter().all(|byte| *byte == b'x'), "what was sent in spite of it is lost");
}

#[test]
fn a_gone_reader_is_not_noticed() {
    let sink = Sink { broken: true, ..Sink::default() };
    let rig = Rig::new(Some(&sink));
    for _ in 0..3 * OUTPUT_BYTES {
        rig.set(0, b'x');
    }
    assert!(rig.serial.flush(Duration::from_secs(10)));
    rig.set(0, b'x');
    assert_eq!(rig.get(5), 0x60);
}

#[test]
fn input_interrupts_and_waits_for_room() {
    let rig = Rig::new(None);
    rig.set(2, 0x41);
    rig.set(1, 1);
    let input = rig.serial.input();
    assert_eq!(input.offer(b"abc"), 3);
    assert!(rig.level());
    assert_eq!(rig.get(2), 0xcc, "below the trigger level");
    assert_eq!(input.offer(b"d"), 1);
    assert_eq!(rig.get(2), 0xc4);
    assert_eq!([0; 4].map(|_| rig.get(0)), *b"abcd");
    assert_eq!((rig.get(2), rig.level(), rig.get(5)), (0xc1, false, 0x60));

    let long: Vec<u8> = (0..INPUT_BYTES + 5000).map(|i| i as u8).collect();
    assert_eq!(input.offer(&long), INPUT_BYTES);
    let sender = {
        let (input, rest) = (input.clone(), long[INPUT_BYTES..].to_vec());
        thread::spawn(move || input.send(&rest))
    };
    let mut got = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while got.len() < long.len() {
        assert!(Instant::now() < deadline);
        if rig.get(5) & 1 != 0 {
            got.push(rig.get(0));
        } else {
            thread::yield_now();
        }
    }
    assert!(sender.join().unwrap());
    assert!(got == long);
    // who waits when the port goes is told
    assert!(input.offer(&long) > 0);
    let sender = thread::spawn(move || input.send(&[0; 2 * INPUT_BYTES]));
    drop(rig);
    assert!(!sender.join().unwrap());
}

#[test]
fn transmitter_interrupts_as_drivers_expect() {
    let rig = Rig::new(None);
    assert_eq!(rig.get(2), 1);
    rig.set(1, 2);
    assert!(rig.level());
    assert_eq!((rig.get(2), rig.get(2), rig.level()), (2, 1, false));
    rig.set(0, b'a');
    assert_eq!((rig.level(), rig.edges()), (true, 2));
    rig.set(1, 0);
    assert_eq!((rig.get(2), rig.level()), (1, false));
}

#[test]
fn probing_finds_a_16550a() {
    let rig = Rig::new(None);
    // Linux `autoconfig`: interrupt enables, scratch, loopback, FIFO
    rig.set(1, 0xff);
    assert_eq!(rig.get(1), 0x0f);
    rig.set(1, 0);
    rig.set(7, 0xa5);
    assert_eq!(rig.get(7), 0xa5);
    rig.set(4, 0x1a);
    assert_eq!(rig.get(6) & 0xf0, 0x90);
    rig.set(4, 0);
    assert_eq!(rig.get(6) & 0xf0, 0xb0);
    rig.set(2, 1);
    assert_eq!(rig.get(2), 0xc1);
    // divisor latch
    rig.set(3, 0x83);
    rig.set(0, 1);
    rig.set(1, 2);
    assert_eq!((rig.get(0), rig.get(1)), (1, 2));
    rig.set(3, 0x03);
    assert_eq!((rig.get(0), rig.get(1)), (0, 0));
}

#[test]
fn loopback_hears_itself_and_overruns() {
    let sink = Sink::default();
    let rig = Rig::new(Some(&sink));
    rig.set(2, 1);
    rig.set(1, 4 | 8);
    rig.set(4, 0x10);
    assert_eq!((rig.get(2) & 15, rig.get(6)), (0, 0x0b), "the line went dead");
    assert_eq!(rig.serial.input().offer(b"outside"), 7);
    for i in 0..17 {
        rig.set(0, i);
    }
    assert_eq!(rig.get(2) & 15, 6);
    assert_eq!((rig.get(5) & 3, rig.get(5) & 3), (3, 1));
    assert_eq!([0; 16].map(|_| rig.get(0)), std::array::from_fn(|i| i as u8));
    assert_eq!(rig.get(5) & 1, 0);
    rig.set(4, 0);
    assert_eq!(rig.get(0), b'o');
    assert!(sink.bytes.lock().unwrap().is_empty());
}

impl Subject for Rig {
    type Saved = SavedSerial;

    fn fresh() -> Self {
        Self::new(None)
    }

    fn poke(&self, op: Op) -> Vec<u8> {
        let mut seen = match op.kind % 8 {
            0 => vec![self.serial.input().offer(&op.bytes()) as u8],
            1..=4 => vec![self.get(op.address as u16 % 9)],
            _ => {
                self.set(op.address as u16 % 9, op.value as u8);
                vec![]
            }
        };
        seen.push(self.level().into());
        seen
    }

    fn save(&self) -> SavedSerial {
        self.serial.save()
    }

    fn restored(saved: SavedSerial) -> Result<Self, String> {
        let pin = FakePin::new();
        let line = pin.line();
        let serial = Serial::restore(line, None, saved).map_err(|error| error.to_string())?;
        Ok(Self { serial, pin })
    }
}

#[test]
fn conformance() {
    conformance::check::<Rig>();
}
