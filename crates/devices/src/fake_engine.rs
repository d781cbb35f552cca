//! An engine without CPUs that keeps what devices ask of it.

use std::{
    os::fd::BorrowedFd,
    sync::{Arc, Mutex},
};

use vireo_cpu::{CpuError, Engine, MsiLine, MsiMessage, Vcpu, VcpuConfig, cpuid::CpuidTable};

pub type Log = Arc<Mutex<Vec<MsiMessage>>>;

#[derive(Default)]
pub struct FakeEngine {
    pub sent: Log,
    /// Whether [`Engine::ioeventfd`] works.
    pub short_cuts: bool,
    pub ioeventfds: Mutex<Vec<(u64, u32)>>,
}

struct FakeLine {
    message: Mutex<Option<MsiMessage>>,
    sent: Log,
}

impl FakeEngine {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// The messages since the last call.
    pub fn take_sent(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut *self.sent.lock().unwrap())
    }
}

impl MsiLine for FakeLine {
    fn set(&self, message: Option<MsiMessage>) {
        *self.message.lock().unwrap() = message;
    }
    fn trigger(&self) {
        if let Some(message) = *self.message.lock().unwrap() {
            self.sent.lock().unwrap().push(message);
        }
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn create_vcpu(&self, _: &VcpuConfig) -> Result<Box<dyn Vcpu>, CpuError> {
        Err(CpuError::Other("no CPUs here".into()))
    }
    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, CpuError> {
        Ok(Arc::new(FakeLine { message: Mutex::new(None), sent: self.sent.clone() }))
    }
    fn send_msi(&self, message: MsiMessage) {
        self.sent.lock().unwrap().push(message);
    }
    fn ioeventfd(&self, gpa: u64, len: u32, _: BorrowedFd<'_>) -> bool {
        if self.short_cuts {
            self.ioeventfds.lock().unwrap().push((gpa, len));
        }
        self.short_cuts
    }
    fn remove_ioeventfd(&self, gpa: u64, len: u32, _: BorrowedFd<'_>) {
        let mut all = self.ioeventfds.lock().unwrap();
        let at = all.iter().position(|entry| *entry == (gpa, len)).expect("an ioeventfd that exists");
        all.swap_remove(at);
    }
    fn supported_cpuid(&self) -> Result<CpuidTable, CpuError> {
        Err(CpuError::Other("no CPUs here".into()))
    }
}
