use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use proptest::prelude::*;

use super::*;
use crate::{
    conformance::{self, Op, Subject},
    fake_pin::FakePin,
};

/// 2026-02-28 23:59:58 UTC, a Saturday.
const START: u64 = 1_772_323_198;

struct Rig {
    rtc: Rtc,
    pin: Arc<FakePin>,
    /// Milliseconds since the epoch.
    now: Arc<AtomicU64>,
}

fn clock(now: &Arc<AtomicU64>) -> Clock {
    let now = now.clone();
    Box::new(move || Duration::from_millis(now.load(Ordering::Relaxed)))
}

impl Rig {
    fn new() -> Self {
        let now = Arc::new(AtomicU64::new(START * 1000));
        let pin = FakePin::new();
        Self { rtc: Rtc::with_clock(pin.line(), clock(&now)), pin, now }
    }

    fn get(&self, register: u8) -> u8 {
        self.rtc.write_port(0, register);
        self.rtc.read_port(1)
    }

    fn set(&self, register: u8, value: u8) {
        self.rtc.write_port(0, register);
        self.rtc.write_port(1, value);
    }

    fn pass(&self, millis: u64) {
        self.now.fetch_add(millis, Ordering::Relaxed);
    }

    fn date(&self) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|register| self.get(register))
    }
}

#[test]
fn the_time_is_the_hosts() {
    let rig = Rig::new();
    assert_eq!(rig.date(), [0x20, 0x26, 0x02, 0x28, 0x23, 0x59, 0x58, 7]);
    rig.pass(2000);
    assert_eq!(rig.date(), [0x20, 0x26, 0x03, 0x01, 0x00, 0x00, 0x00, 1]);
    assert_eq!((rig.get(REGISTER_A), rig.get(REGISTER_B), rig.get(REGISTER_D)), (A_DEFAULT, 2, 0x80));
}

#[test]
fn formats_follow_register_b() {
    let rig = Rig::new();
    rig.set(REGISTER_B, B_BINARY);
    assert_eq!(rig.date(), [20, 26, 2, 28, 11 | HOUR_PM, 59, 58, 7]);
    rig.pass(2000);
    assert_eq!(rig.get(HOURS), 12);
    rig.pass(12 * 3_600_000);
    assert_eq!(rig.get(HOURS), 12 | HOUR_PM);
    rig.set(REGISTER_B, 0);
    assert_eq!(rig.get(HOURS), 0x12 | HOUR_PM);
}

#[test]
fn a_time_that_was_set_goes_on() {
    let rig = Rig::new();
    rig.set(REGISTER_B, B_SET | B_24_HOURS);
    rig.pass(5000);
    assert_eq!(rig.get(SECONDS), 0x58, "frozen");
    for (register, value) in
        [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)]
    {
        rig.set(register, value);
    }
    rig.set(REGISTER_B, B_24_HOURS);
    assert_eq!(rig.date(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 6]);
    rig.pass(1000);
    assert_eq!(rig.date(), [0x20, 0x00, 0x01, 0x01, 0, 0, 0, 7]);
    // what does not exist is not taken
    rig.set(MONTH, 0x13);
    assert_eq!(rig.get(MONTH), 0x01);
    rig.set(MINUTES, 0x30);
    assert_eq!(rig.get(MINUTES), 0x30);
}

#[test]
fn updates_are_announced_and_noted() {
    let rig = Rig::new();
    assert_eq!(rig.get(REGISTER_C), 0);
    rig.pass(999);
    assert_eq!((rig.get(REGISTER_C), rig.get(REGISTER_A) & A_UPDATING), (0, 0));
    rig.pass(1);
    assert_eq!((rig.get(REGISTER_C), rig.get(REGISTER_C)), (C_UPDATE_ENDED, 0));
    let rtc = Rtc::with_clock(rig.pin.line(), Box::new(|| Duration::from_micros(999_800)));
    rtc.write_port(0, REGISTER_A);
    assert_eq!(rtc.read_port(1) & A_UPDATING, A_UPDATING);
}

#[test]
fn alarms_match_fields_or_anything() {
    let rig = Rig::new();
    rig.set(SECONDS_ALARM, 0x02);
    rig.set(MINUTES_ALARM, 0x00);
    rig.set(HOURS_ALARM, 0xff);
    rig.get(REGISTER_C);
    rig.pass(3_000);
    assert_eq!(rig.get(REGISTER_C), C_UPDATE_ENDED, "00:00:01");
    rig.pass(1_000);
    assert_eq!(rig.get(REGISTER_C), C_UPDATE_ENDED | C_ALARM);
    rig.pass(3_599_000);
    assert_eq!(rig.get(REGISTER_C), C_UPDATE_ENDED);
    rig.pass(1_000);
    assert_eq!(rig.get(REGISTER_C), C_UPDATE_ENDED | C_ALARM, "an hour later");
    rig.pass(40 * 86_400_000);
    assert_eq!(rig.get(REGISTER_C), C_UPDATE_ENDED | C_ALARM);
    rig.set(HOURS_ALARM, 0x25);
    rig.pass(40 * 86_400_000);
    assert_eq!(rig.get(REGISTER_C), C_UPDATE_ENDED, "never");
    assert_eq!(rig.pin.edges(), 0, "not enabled");
}

#[test]
fn interrupts_come_by_themselves() {
    let pin = FakePin::new();
    let rtc = Rtc::new(pin.line());
    let set = |register, value| {
        rtc.write_port(0, register);
        rtc.write_port(1, value);
    };
    let wait = || {
        let start = std::time::Instant::now();
        while !pin.level() {
            assert!(start.elapsed() < Duration::from_secs(5), "no interrupt");
            std::thread::sleep(Duration::from_millis(5));
        }
        rtc.write_port(0, REGISTER_C);
        rtc.read_port(1)
    };
    set(REGISTER_B, B_24_HOURS | B_UPDATE_INTERRUPT);
    assert_eq!(wait(), C_INTERRUPT | C_UPDATE_ENDED);
    assert!(!pin.level());
    for register in [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM] {
        set(register, 0xff);
    }
    set(REGISTER_B, B_24_HOURS | B_ALARM_INTERRUPT);
    assert_eq!(wait(), C_INTERRUPT | C_UPDATE_ENDED | C_ALARM);
    set(REGISTER_B, B_24_HOURS);
    let edges = pin.edges();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(pin.edges(), edges, "disabled again");
}

#[test]
fn the_rest_is_memory() {
    let rig = Rig::new();
    rig.set(0x40, 0xa5);
    rig.set(0x80 | 0x41, 0x5a);
    assert_eq!((rig.get(0x40), rig.get(0x41), rig.rtc.read_port(0)), (0xa5, 0x5a, 0xff));
}

proptest! {
    #[test]
    fn dates_convert_both_ways(seconds in -62_167_219_200i64..=253_402_300_799) {
        let date = Date::from_unix(seconds);
        prop_assert_eq!(date.to_unix(), Some(seconds));
        // against the C library
        // SAFETY: all zeroes are a `tm`, and both pointers are to locals.
        let tm = unsafe {
            let mut tm: libc::tm = std::mem::zeroed();
            libc::gmtime_r(&seconds, &mut tm);
            tm
        };
        prop_assert_eq!(
            (i64::from(tm.tm_year) + 1900, tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, tm.tm_wday + 1),
            (date.year, date.month.into(), date.day.into(), date.hour.into(), date.minute.into(), date.second.into(), date.weekday.into())
        );
    }
}

impl Subject for Rig {
    type Saved = SavedRtc;

    fn fresh() -> Self {
        Self::new()
    }

    fn poke(&self, op: Op) -> Vec<u8> {
        let mut seen = match op.kind % 4 {
            0 => vec![self.get(op.address as u8)],
            1 => {
                self.set(op.address as u8, op.value as u8);
                vec![]
            }
            _ => vec![self.get(op.address as u8 % 14)],
        };
        seen.push(self.pin.level().into());
        seen
    }

    fn save(&self) -> SavedRtc {
        self.rtc.save()
    }

    fn restored(saved: SavedRtc) -> Result<Self, String> {
        let now = Arc::new(AtomicU64::new(START * 1000));
        let pin = FakePin::new();
        let rtc = Rtc::restore_with_clock(pin.line(), clock(&now), &saved).map_err(|error| error.to_string())?;
        Ok(Self { rtc, pin, now })
    }
}

#[test]
fn conformance() {
    conformance::check::<Rig>();
}
