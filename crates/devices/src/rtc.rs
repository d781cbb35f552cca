//! The real-time clock and CMOS memory (Motorola MC146818A data sheet) at ports 0x70 and 0x71.
//!
//! The clock is the host's UTC plus what the guest set it off by. Nothing ticks while nobody looks, except once
//! a second while alarm or update interrupts are enabled. Periodic interrupts do not exist: Linux makes its own.

mod calendar;

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use minicbor::{Decode, Encode};

use crate::{bus::BytePorts, interrupt::InterruptLine, saved::BadState};
use calendar::Date;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Where PCs keep the century; the FADT says so.
pub const CENTURY: u8 = 0x32;
const BYTES: usize = 128;

const A_UPDATING: u8 = 1 << 7;
/// 32768 Hz time base, 1024 Hz periodic rate: what a BIOS leaves.
const A_DEFAULT: u8 = 0x26;
const B_SET: u8 = 1 << 7;
const B_ALARM_INTERRUPT: u8 = 1 << 5;
const B_UPDATE_INTERRUPT: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const C_INTERRUPT: u8 = 1 << 7;
const C_ALARM: u8 = 1 << 5;
const C_UPDATE_ENDED: u8 = 1 << 4;
/// The enable bits of register B are where their flags are in register C.
const INTERRUPTS: u8 = B_ALARM_INTERRUPT | B_UPDATE_INTERRUPT;
/// An alarm field from here on matches everything.
const ANY: u8 = 0xc0;
const DAY_SECONDS: i64 = 86_400;
const D_VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;

/// `UIP` rises this long before the time changes (data sheet, figure 11), so a reader that sees it low is safe.
const UPDATE_AHEAD: Duration = Duration::from_micros(244);

/// Time since the Unix epoch.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

pub struct Rtc {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Interrupts were enabled or the clock goes away.
    changed: Condvar,
}

struct State {
    clock: Clock,
    line: InterruptLine,
    index: u8,
    /// RAM, and the time registers while the guest sets them.
    memory: [u8; BYTES],
    /// Guest time minus host time in seconds.
    offset: i64,
    /// The guest's second up to which `flags` are right.
    seen: i64,
    /// Register C, without the bit that sums it up.
    flags: u8,
    /// Whether the thread runs that raises interrupts.
    ticking: bool,
    closed: bool,
}

/// What a snapshot keeps of an [`Rtc`]. Time goes on while the machine is saved.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedRtc {
    #[n(0)]
    pub index: u8,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub memory: Vec<u8>,
    #[n(2)]
    pub offset_seconds: i64,
    #[n(3)]
    pub seen_seconds: i64,
    #[n(4)]
    pub flags: u8,
}

fn host_utc() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Rtc {
    pub const PORTS: u16 = 2;

    pub fn new(line: InterruptLine) -> Self {
        Self::with_clock(line, Box::new(host_utc))
    }

    pub fn with_clock(line: InterruptLine, clock: Clock) -> Self {
        let seen = clock().as_secs() as i64;
        let mut memory = [0; BYTES];
        memory[usize::from(REGISTER_A)] = A_DEFAULT;
        memory[usize::from(REGISTER_B)] = B_24_HOURS;
        let (index, offset, flags, ticking, closed) = (0, 0, 0, false, false);
        let state = State { clock, line, index, memory, offset, seen, flags, ticking, closed };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }) }
    }

    pub fn restore(line: InterruptLine, saved: &SavedRtc) -> Result<Self, BadState> {
        Self::restore_with_clock(line, Box::new(host_utc), saved)
    }

    pub fn restore_with_clock(line: InterruptLine, clock: Clock, saved: &SavedRtc) -> Result<Self, BadState> {
        let rtc = Self::with_clock(line, clock);
        let mut state = rtc.shared.lock();
        state.memory = saved.memory[..].try_into().map_err(|_| {
            BadState::new("real-time clock", format!("{} bytes of memory instead of {BYTES}", saved.memory.len()))
        })?;
        state.index = saved.index & 0x7f;
        (state.offset, state.seen) = (saved.offset_seconds, saved.seen_seconds);
        state.flags = saved.flags & (C_ALARM | C_UPDATE_ENDED);
        state.update_line();
        drop(state);
        rtc.tick_if_wanted();
        Ok(rtc)
    }

    pub fn save(&self) -> SavedRtc {
        let state = self.shared.lock();
        SavedRtc {
            index: state.index,
            memory: state.memory.to_vec(),
            offset_seconds: state.offset,
            seen_seconds: state.seen,
            flags: state.flags,
        }
    }

    /// Lets the thread that raises interrupts run if there are any to raise; few guests ever want one.
    fn tick_if_wanted(&self) {
        let mut state = self.shared.lock();
        if !state.wants_ticks() {
            return;
        }
        if state.ticking {
            self.shared.changed.notify_all();
        } else {
            let shared = self.shared.clone();
            // Without the thread the clock is one whose interrupt is not wired.
            state.ticking = thread::Builder::new().name("vireo-rtc".into()).spawn(move || shared.tick()).is_ok();
        }
    }
}

impl Drop for Rtc {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the clock as each second begins, while somebody waits for that.
    fn tick(&self) {
        let mut state = self.lock();
        while !state.closed {
            if state.wants_ticks() {
                state.catch_up();
                let left = Duration::from_secs(1) - Duration::from_nanos((state.clock)().subsec_nanos().into());
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl State {
    fn control(&self) -> u8 {
        self.memory[usize::from(REGISTER_B)]
    }

    fn seconds(&self) -> i64 {
        ((self.clock)().as_secs() as i64).saturating_add(self.offset)
    }

    fn read(&mut self, register: u8) -> u8 {
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => self.read_time(register),
            REGISTER_A => self.memory[usize::from(REGISTER_A)] | self.updating(),
            REGISTER_C => {
                self.catch_up();
                let flags = std::mem::take(&mut self.flags);
                self.update_line();
                flags | if flags & self.control() & INTERRUPTS != 0 { C_INTERRUPT } else { 0 }
            }
            REGISTER_D => D_VALID,
            _ => self.memory[usize::from(register)],
        }
    }

    fn wants_ticks(&self) -> bool {
        self.control() & INTERRUPTS != 0 && self.control() & B_SET == 0
    }

    /// Notes what happened since `seen`.
    fn catch_up(&mut self) {
        let now = self.seconds();
        let before = std::mem::replace(&mut self.seen, now);
        if self.control() & B_SET == 0 && now != before {
            self.flags |= C_UPDATE_ENDED;
            // More than a day has all alarms in it; a clock set back has none.
            let first = before.saturating_add(1).max(now.saturating_sub(DAY_SECONDS - 1));
            if (first..=now).any(|second| self.alarm_matches(second)) {
                self.flags |= C_ALARM;
            }
        }
        self.update_line();
    }

    fn alarm_matches(&self, second: i64) -> bool {
        let of_day = second.rem_euclid(DAY_SECONDS);
        let alarm = |register: u8| self.memory[usize::from(register)];
        let matches = |value: u8, now: i64, decoded: u8| value >= ANY || i64::from(decoded) == now;
        let (s, m, h) = (alarm(SECONDS_ALARM), alarm(MINUTES_ALARM), alarm(HOURS_ALARM));
        matches(s, of_day % 60, self.decode_number(s))
            && matches(m, of_day / 60 % 60, self.decode_number(m))
            && matches(h, of_day / 3600, self.decode_hour(h))
    }

    fn update_line(&self) {
        self.line.set_level(self.flags & self.control() & INTERRUPTS != 0);
    }

    fn updating(&self) -> u8 {
        let into = (self.clock)().subsec_nanos();
        let soon = Duration::from_secs(1) - Duration::from_nanos(u64::from(into)) <= UPDATE_AHEAD;
        if soon && self.control() & B_SET == 0 { A_UPDATING } else { 0 }
    }

    fn read_time(&self, register: u8) -> u8 {
        if self.control() & B_SET != 0 {
            return self.memory[usize::from(register)];
        }
        self.encode(register, Date::from_unix(self.seconds()))
    }

    /// One field of a date in the format that register B asks for.
    fn encode(&self, register: u8, date: Date) -> u8 {
        let value = match register {
            SECONDS => date.second,
            MINUTES => date.minute,
            HOURS => return self.encode_hour(date.hour),
            WEEKDAY => date.weekday,
            DAY => date.day,
            MONTH => date.month,
            YEAR => date.year.rem_euclid(100) as u8,
            _ => date.year.div_euclid(100) as u8,
        };
        self.encode_number(value)
    }

    fn encode_number(&self, value: u8) -> u8 {
        if self.control() & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode_number(&self, value: u8) -> u8 {
        if self.control() & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.control() & B_24_HOURS != 0 {
            return self.encode_number(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode_number(twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.control() & B_24_HOURS != 0 {
            return self.decode_number(value);
        }
        let noon = if value & HOUR_PM != 0 { 12 } else { 0 };
        self.decode_number(value & !HOUR_PM) % 12 + noon
    }

    fn write(&mut self, register: u8, value: u8) {
        // What has passed is judged by the alarm and the format that held then.
        self.catch_up();
        match register {
            REGISTER_A => self.memory[usize::from(REGISTER_A)] = value & !A_UPDATING,
            REGISTER_B => self.write_control(value),
            REGISTER_C | REGISTER_D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY if self.control() & B_SET == 0 => {
                // Without SET each field takes effect at once.
                self.freeze();
                self.memory[usize::from(register)] = value;
                self.thaw();
            }
            _ => self.memory[usize::from(register)] = value,
        }
    }

    fn write_control(&mut self, value: u8) {
        let setting = self.control() & B_SET != 0;
        if !setting && value & B_SET != 0 {
            self.freeze();
        }
        // SET clears the update interrupt's enable bit. Fields that were set are read in the new format.
        self.memory[usize::from(REGISTER_B)] = if value & B_SET != 0 { value & !B_UPDATE_INTERRUPT } else { value };
        if setting && value & B_SET == 0 {
            self.thaw();
        }
        self.update_line();
    }

    /// Puts the time as it is now into the registers.
    fn freeze(&mut self) {
        let date = Date::from_unix(self.seconds());
        for register in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
            self.memory[usize::from(register)] = self.encode(register, date);
        }
    }

    /// Takes the registers' time for the time; one that does not exist changes nothing.
    fn thaw(&mut self) {
        let field = |register: u8| self.decode_number(self.memory[usize::from(register)]);
        let date = Date {
            second: field(SECONDS),
            minute: field(MINUTES),
            hour: self.decode_hour(self.memory[usize::from(HOURS)]),
            weekday: 1,
            day: field(DAY),
            month: field(MONTH),
            year: i64::from(field(CENTURY)) * 100 + i64::from(field(YEAR)),
        };
        if let Some(seconds) = date.to_unix() {
            self.offset = seconds - (self.clock)().as_secs() as i64;
            // Being set is not passing.
            self.seen = seconds;
        }
    }
}

impl BytePorts for Rtc {
    fn read_port(&self, offset: u16) -> u8 {
        let mut state = self.shared.lock();
        let index = state.index;
        // The index is write-only on PCs.
        if offset == 0 { 0xff } else { state.read(index) }
    }

    fn write_port(&self, offset: u16, value: u8) {
        {
            let mut state = self.shared.lock();
            let index = state.index;
            match offset {
                // The top bit masks NMIs, of which there are none.
                0 => state.index = value & 0x7f,
                _ => state.write(index, value),
            }
        }
        self.tick_if_wanted();
    }
}

#[cfg(test)]
mod tests;
