use std::sync::Mutex;

use super::*;
use crate::{
    bus::PortIo,
    conformance::{self, Op, Subject},
};

fn log() -> (Arc<Mutex<Vec<PowerEvent>>>, PowerCallback) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let callback = {
        let events = events.clone();
        Arc::new(move |event| events.lock().unwrap().push(event))
    };
    (events, callback)
}

#[test]
fn each_way_out_is_told() {
    let (events, callback) = log();
    let take = || std::mem::take(&mut *events.lock().unwrap());
    let sleep = SleepPorts::new(5, callback.clone());
    sleep.write_port(0, 5 << 2);
    sleep.write_port(0, 3 << 2 | SLEEP_ENABLE);
    sleep.write_port(1, 0xff);
    assert_eq!(take(), []);
    sleep.write_port(0, 5 << 2 | SLEEP_ENABLE);
    assert_eq!(take(), [PowerEvent::PowerOff]);
    assert_eq!((sleep.read_port(0), sleep.read_port(1)), (5 << 2, 0));

    let reset = ResetPort::new(1, callback.clone());
    reset.write_port(0, 0);
    assert_eq!(take(), []);
    reset.write_port(0, 1);
    assert_eq!(take(), [PowerEvent::Reset]);

    let keyboard = KeyboardReset::new(callback.clone());
    keyboard.write_port(0, 0xaa);
    assert_eq!((take(), keyboard.read_port(0)), (vec![], 0xff));
    keyboard.write_port(0, 0xfe);
    assert_eq!(take(), [PowerEvent::Reset]);

    let panic = PanicPort::new(callback);
    assert_eq!(panic.read_port(0), 1);
    panic.write_port(0, 2);
    assert_eq!(take(), []);
    panic.write_port(0, 1);
    assert_eq!(take(), [PowerEvent::Panic]);
}

impl Subject for SleepPorts {
    type Saved = SavedSleepPorts;
    fn fresh() -> Self {
        Self::new(5, log().1)
    }
    fn poke(&self, op: Op) -> Vec<u8> {
        let op = Op { address: op.address % 2, size: 1, ..op };
        op.access(|at, data| PortIo::read(self, at as u16, data), |at, data| PortIo::write(self, at as u16, data))
    }
    fn save(&self) -> SavedSleepPorts {
        SleepPorts::save(self)
    }
    fn restored(saved: SavedSleepPorts) -> Result<Self, String> {
        Ok(Self::restore(5, log().1, saved))
    }
}

#[test]
fn conformance() {
    conformance::check::<SleepPorts>();
}
