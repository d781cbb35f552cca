use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use vireo_packet::{Backend, MacAddress, Offloads};

use super::device::feature::{CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6};

/// What the device and its threads share.
pub(super) struct Shared {
    pub backend: Arc<dyn Backend>,
    pub up: AtomicBool,
    settings: Mutex<Settings>,
}

pub(super) struct Settings {
    pub mac: MacAddress,
    /// Feature bits that the driver took; 0 while no queue has started.
    pub features: u64,
    pub guest_offloads: Option<u64>,
    config_changed: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Shared {
    pub fn new(backend: Arc<dyn Backend>, mac: MacAddress) -> Self {
        let settings = Settings { mac, features: 0, guest_offloads: None, config_changed: None };
        Self { backend, up: AtomicBool::new(true), settings: Mutex::new(settings) }
    }

    pub fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue starts with these.
    pub fn started(&self, features: u64, config_changed: Arc<dyn Fn() + Send + Sync>) {
        let mut settings = self.settings();
        settings.features = features;
        settings.config_changed = Some(config_changed);
        self.apply_offloads(&settings);
    }

    pub fn stopped(&self) {
        self.settings().config_changed = None;
    }

    /// Tells the backend what the driver can take and will send.
    pub fn apply_offloads(&self, settings: &Settings) {
        let to_backend = settings.features;
        let to_guest = settings.features & settings.guest_offloads.unwrap_or(u64::MAX);
        let wanted = Offloads {
            checksum_in: to_backend & CSUM != 0,
            checksum_out: to_guest & GUEST_CSUM != 0,
            segmentation_in: to_backend & (HOST_TSO4 | HOST_TSO6) != 0,
            // The backend does not tell IPv4 from IPv6 here, so the driver must take both.
            segmentation_out: to_guest & GUEST_CSUM != 0 && to_guest & GUEST_TSO4 != 0 && to_guest & GUEST_TSO6 != 0,
        };
        let offered = self.backend.offloads();
        self.backend.set_offloads(Offloads {
            checksum_in: wanted.checksum_in && offered.checksum_in,
            checksum_out: wanted.checksum_out && offered.checksum_out,
            segmentation_in: wanted.segmentation_in && offered.segmentation_in,
            segmentation_out: wanted.segmentation_out && offered.segmentation_out,
        });
    }
}

/// The plug of a network device. Cheap to clone.
#[derive(Clone)]
pub struct Link(pub(super) Arc<Shared>);

impl Link {
    /// Plugs the cable in or out; the guest is told.
    pub fn set_up(&self, up: bool) {
        if self.0.up.swap(up, Ordering::AcqRel) == up {
            return;
        }
        let tell = self.0.settings().config_changed.clone();
        if let Some(tell) = tell {
            tell();
        }
    }

    pub fn is_up(&self) -> bool {
        self.0.up.load(Ordering::Acquire)
    }
}
