//! The real-time clock and CMOS memory (Motorola MC146818A data sheet) at ports 0x70 and 0x71.
//!
//! The clock is the host's UTC plus what the guest set it off by; nothing ticks while nobody looks. Alarm and
//! periodic interrupts do not exist: register B keeps their bits, and they never fire.

mod calendar;

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use minicbor::{Decode, Encode};

use crate::{bus::BytePorts, saved::BadState};
use calendar::Date;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
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
const B_UPDATE_INTERRUPT: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const C_UPDATE_ENDED: u8 = 1 << 4;
const D_VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;

/// `UIP` rises this long before the time changes (data sheet, figure 11), so a reader that sees it low is safe.
const UPDATE_AHEAD: Duration = Duration::from_micros(244);

/// Time since the Unix epoch.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

pub struct Rtc {
    state: Mutex<State>,
}

struct State {
    clock: Clock,
    index: u8,
    /// RAM, and the time registers while the guest sets them.
    memory: [u8; BYTES],
    /// Guest time minus host time in seconds.
    offset: i64,
    /// The second in which register C was last read.
    seen: i64,
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
}

impl Default for Rtc {
    fn default() -> Self {
        Self::with_clock(Box::new(host_utc))
    }
}

fn host_utc() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Rtc {
    pub const PORTS: u16 = 2;

    pub fn with_clock(clock: Clock) -> Self {
        let seen = clock().as_secs() as i64;
        let mut memory = [0; BYTES];
        memory[usize::from(REGISTER_A)] = A_DEFAULT;
        memory[usize::from(REGISTER_B)] = B_24_HOURS;
        Self { state: Mutex::new(State { clock, index: 0, memory, offset: 0, seen }) }
    }

    pub fn restore(saved: &SavedRtc) -> Result<Self, BadState> {
        Self::restore_with_clock(Box::new(host_utc), saved)
    }

    pub fn restore_with_clock(clock: Clock, saved: &SavedRtc) -> Result<Self, BadState> {
        let rtc = Self::with_clock(clock);
        let mut state = rtc.lock();
        state.memory = saved.memory[..].try_into().map_err(|_| {
            BadState::new("real-time clock", format!("{} bytes of memory instead of {BYTES}", saved.memory.len()))
        })?;
        state.index = saved.index & 0x7f;
        (state.offset, state.seen) = (saved.offset_seconds, saved.seen_seconds);
        drop(state);
        Ok(rtc)
    }

    pub fn save(&self) -> SavedRtc {
        let state = self.lock();
        SavedRtc {
            index: state.index,
            memory: state.memory.to_vec(),
            offset_seconds: state.offset,
            seen_seconds: state.seen,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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
                let now = self.seconds();
                let ended = now != self.seen && self.control() & B_SET == 0;
                self.seen = now;
                if ended { C_UPDATE_ENDED } else { 0 }
            }
            REGISTER_D => D_VALID,
            _ => self.memory[usize::from(register)],
        }
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
        if self.control() & B_BINARY != 0 { value } else { value / 10 % 10 << 4 | value % 10 }
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
        }
    }
}

impl BytePorts for Rtc {
    fn read_port(&self, offset: u16) -> u8 {
        let mut state = self.lock();
        let index = state.index;
        // The index is write-only on PCs.
        if offset == 0 { 0xff } else { state.read(index) }
    }

    fn write_port(&self, offset: u16, value: u8) {
        let mut state = self.lock();
        if offset == 0 {
            // The top bit masks NMIs, of which there are none.
            state.index = value & 0x7f;
        } else {
            let index = state.index;
            state.write(index, value);
        }
    }
}

#[cfg(test)]
mod tests;
