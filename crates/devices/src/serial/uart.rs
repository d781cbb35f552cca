use std::collections::VecDeque;

use minicbor::{Decode, Encode};

use crate::saved::BadState;

const FIFO_BYTES: usize = 16;

mod ier {
    pub const RECEIVED: u8 = 1 << 0;
    pub const TRANSMITTER: u8 = 1 << 1;
    pub const LINE_STATUS: u8 = 1 << 2;
    pub const MODEM_STATUS: u8 = 1 << 3;
    pub const ALL: u8 = 0x0f;
}

mod iir {
    pub const MODEM_STATUS: u8 = 0x00;
    pub const NONE: u8 = 0x01;
    pub const TRANSMITTER: u8 = 0x02;
    pub const RECEIVED: u8 = 0x04;
    pub const LINE_STATUS: u8 = 0x06;
    pub const TIMEOUT: u8 = 0x0c;
    pub const FIFOS: u8 = 0xc0;
}

mod fcr {
    pub const ENABLE: u8 = 1 << 0;
    pub const CLEAR_RECEIVER: u8 = 1 << 1;
    /// Enable and trigger level stay.
    pub const KEPT: u8 = 0xc9;
}

mod lsr {
    pub const DATA_READY: u8 = 1 << 0;
    pub const OVERRUN: u8 = 1 << 1;
    pub const TRANSMITTER_READY: u8 = 1 << 5;
    pub const TRANSMITTER_EMPTY: u8 = 1 << 6;
}

mod mcr {
    pub const DTR: u8 = 1 << 0;
    pub const RTS: u8 = 1 << 1;
    pub const OUT1: u8 = 1 << 2;
    pub const OUT2: u8 = 1 << 3;
    pub const LOOP: u8 = 1 << 4;
    pub const ALL: u8 = 0x1f;
}

mod msr {
    pub const RING_ENDED: u8 = 1 << 2;
    pub const CTS: u8 = 1 << 4;
    pub const DSR: u8 = 1 << 5;
    pub const RING: u8 = 1 << 6;
    pub const CARRIER: u8 = 1 << 7;
    /// Someone is there and ready.
    pub const CONNECTED: u8 = CTS | DSR | CARRIER;
}

/// What each output is wired to in loopback (data sheet, 8.7).
const LOOPS: [(u8, u8); 4] =
    [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RING), (mcr::OUT2, msr::CARRIER)];

const LCR_DIVISOR: u8 = 1 << 7;
/// 9600 baud and 8N1, as a BIOS leaves it.
const DEFAULT_DIVISOR: u16 = 12;
const DEFAULT_LCR: u8 = 3;

/// The registers, without a clock: a byte that is sent is gone at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    overrun: bool,
    /// Modem inputs (high half) and what changed of them (low half).
    msr: u8,
    scratch: u8,
    divisor: u16,
    fifo: VecDeque<u8>,
    /// The transmitter became ready and nobody knows yet.
    transmitter_pending: bool,
    transmitter_ready: bool,
}

/// What a snapshot keeps of a [`super::Serial`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SavedSerial {
    #[n(0)]
    pub ier: u8,
    #[n(1)]
    pub fcr: u8,
    #[n(2)]
    pub lcr: u8,
    #[n(3)]
    pub mcr: u8,
    #[n(4)]
    pub overrun: bool,
    #[n(5)]
    pub msr: u8,
    #[n(6)]
    pub scratch: u8,
    #[n(7)]
    pub divisor: u16,
    #[cbor(n(8), with = "minicbor::bytes")]
    pub fifo: Vec<u8>,
    #[n(9)]
    pub transmitter_pending: bool,
    /// Input that has not reached the FIFO.
    #[cbor(n(10), with = "minicbor::bytes")]
    pub input: Vec<u8>,
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: DEFAULT_LCR,
            mcr: 0,
            overrun: false,
            msr: msr::CONNECTED,
            scratch: 0,
            divisor: DEFAULT_DIVISOR,
            fifo: VecDeque::with_capacity(FIFO_BYTES),
            transmitter_pending: false,
            transmitter_ready: true,
        }
    }
}

impl Uart {
    pub fn save(&self, input: &VecDeque<u8>) -> SavedSerial {
        SavedSerial {
            ier: self.ier,
            fcr: self.fcr,
            lcr: self.lcr,
            mcr: self.mcr,
            overrun: self.overrun,
            msr: self.msr,
            scratch: self.scratch,
            divisor: self.divisor,
            fifo: self.fifo.iter().copied().collect(),
            transmitter_pending: self.transmitter_pending,
            input: input.iter().copied().collect(),
        }
    }

    /// The registers, and the input that waited.
    pub fn restore(saved: SavedSerial) -> Result<(Self, Vec<u8>), BadState> {
        if saved.fifo.len() > FIFO_BYTES {
            return Err(BadState::new("serial port", format!("{} bytes in the FIFO", saved.fifo.len())));
        }
        let uart = Self {
            ier: saved.ier & ier::ALL,
            fcr: saved.fcr & fcr::KEPT,
            lcr: saved.lcr,
            mcr: saved.mcr & mcr::ALL,
            overrun: saved.overrun,
            msr: saved.msr,
            scratch: saved.scratch,
            divisor: saved.divisor,
            fifo: saved.fifo.into(),
            transmitter_pending: saved.transmitter_pending,
            transmitter_ready: true,
        };
        Ok((uart, saved.input))
    }

    fn has_fifo(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    fn room(&self) -> usize {
        let most = if self.has_fifo() { FIFO_BYTES } else { 1 };
        most.saturating_sub(self.fifo.len())
    }

    fn in_loop(&self) -> bool {
        self.mcr & mcr::LOOP != 0
    }

    /// Whether a byte from outside would be neither lost nor kept out.
    pub fn can_receive(&self) -> bool {
        !self.in_loop() && self.room() > 0
    }

    pub fn receive(&mut self, byte: u8) {
        if self.room() > 0 {
            self.fifo.push_back(byte);
        } else {
            self.overrun = true;
        }
    }

    pub fn set_transmitter_ready(&mut self, ready: bool) {
        if ready && !self.transmitter_ready {
            self.transmitter_pending = true;
        }
        self.transmitter_ready = ready;
    }

    fn trigger_level(&self) -> usize {
        match self.fcr >> 6 {
            _ if !self.has_fifo() => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// The most urgent reason for an interrupt (data sheet, table III), without the FIFO bits.
    fn cause(&self) -> u8 {
        let enabled = |bit: u8| self.ier & bit != 0;
        if enabled(ier::LINE_STATUS) && self.overrun {
            iir::LINE_STATUS
        } else if enabled(ier::RECEIVED) && self.fifo.len() >= self.trigger_level() {
            iir::RECEIVED
        } else if enabled(ier::RECEIVED) && !self.fifo.is_empty() {
            // Time is up at once: there is no line whose next character one could wait for.
            iir::TIMEOUT
        } else if enabled(ier::TRANSMITTER) && self.transmitter_pending {
            iir::TRANSMITTER
        } else if enabled(ier::MODEM_STATUS) && self.msr & 0x0f != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    /// Level of the interrupt line. (`OUT2`, which gates it on PCs, is not looked at: some drivers leave it off.)
    pub fn interrupts(&self) -> bool {
        self.cause() != iir::NONE
    }

    fn divisor_shown(&self) -> bool {
        self.lcr & LCR_DIVISOR != 0
    }

    pub fn read(&mut self, offset: u16) -> u8 {
        match offset {
            0 if self.divisor_shown() => self.divisor as u8,
            0 => self.fifo.pop_front().unwrap_or(0),
            1 if self.divisor_shown() => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => self.read_cause(),
            3 => self.lcr,
            4 => self.mcr,
            5 => self.read_line_status(),
            6 => {
                let value = self.msr;
                self.msr &= 0xf0;
                value
            }
            7 => self.scratch,
            _ => 0xff,
        }
    }

    fn read_cause(&mut self) -> u8 {
        let cause = self.cause();
        if cause == iir::TRANSMITTER {
            self.transmitter_pending = false;
        }
        cause | if self.has_fifo() { iir::FIFOS } else { 0 }
    }

    fn read_line_status(&mut self) -> u8 {
        let ready = if self.transmitter_ready { lsr::TRANSMITTER_READY | lsr::TRANSMITTER_EMPTY } else { 0 };
        let data = if self.fifo.is_empty() { 0 } else { lsr::DATA_READY };
        let overrun = if std::mem::take(&mut self.overrun) { lsr::OVERRUN } else { 0 };
        ready | data | overrun
    }

    /// Returns the byte that goes out, if one does.
    pub fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        match offset {
            0 if self.divisor_shown() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => return self.transmit(value),
            1 if self.divisor_shown() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            1 => self.write_enables(value),
            2 => self.write_fifo_control(value),
            3 => self.lcr = value,
            4 => self.write_modem_control(value),
            7 => self.scratch = value,
            // Line and modem status are read-only.
            _ => {}
        }
        None
    }

    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.transmitter_pending = self.transmitter_ready;
        if self.in_loop() {
            self.receive(value);
            return None;
        }
        Some(value)
    }

    fn write_enables(&mut self, value: u8) {
        let newly = value & !self.ier;
        self.ier = value & ier::ALL;
        // Enabling it while the transmitter is ready interrupts right away; drivers rely on that.
        if newly & ier::TRANSMITTER != 0 && self.transmitter_ready {
            self.transmitter_pending = true;
        }
    }

    fn write_fifo_control(&mut self, value: u8) {
        let toggled = (value ^ self.fcr) & fcr::ENABLE != 0;
        if toggled || value & fcr::CLEAR_RECEIVER != 0 {
            self.fifo.clear();
        }
        // Without the enable bit, the others are not taken.
        self.fcr = if value & fcr::ENABLE != 0 { value & fcr::KEPT } else { 0 };
    }

    fn write_modem_control(&mut self, value: u8) {
        self.mcr = value & mcr::ALL;
        let looped = |&(output, input): &(u8, u8)| if self.mcr & output != 0 { input } else { 0 };
        let inputs = if self.in_loop() { LOOPS.iter().map(looped).sum() } else { msr::CONNECTED };
        let changed = (inputs ^ self.msr) & 0xf0;
        // The ring indicator reports only its end.
        let ring_ended = if changed & !inputs & msr::RING != 0 { msr::RING_ENDED } else { 0 };
        let deltas = (changed & !msr::RING) >> 4 | ring_ended;
        self.msr = inputs | self.msr & 0x0f | deltas;
    }
}
