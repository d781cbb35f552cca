//! The DSDT: what the guest cannot find out by itself.

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
        Interrupt, Memory32Fixed, Method, Name, Or, Package, ResourceTemplate, Return, Scope, Uuid,
    },
    sdt::Sdt,
};

use super::{AcpiConfig, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::layout::{
    COM1_PIN, COM1_PORT, PANIC_PORT, PCI_ECAM_BYTES, PCI_ECAM_START, PCI_MMIO32_BYTES, PCI_MMIO32_START,
    PCI_MMIO64_BYTES, PCI_MMIO64_START, RTC_PIN, RTC_PORT, SLEEP_TYPE_S5,
};

const TABLE_HEADER_BYTES: u32 = 36;
/// Makes integers in the AML 64 bits wide.
const REVISION: u8 = 2;

/// What `_OSC` of a PCI host bridge is called with (PCI firmware specification 3.3, 4.5.1).
const PCI_HOST_BRIDGE_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
/// Of all that an OS may ask to control, it gets the PCI Express capability structures.
const OSC_PCIE_CAPABILITY: u8 = 1 << 4;

pub(super) fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut system_bus = Vec::new();
    for device in [pci_host(), ecam_reservation(), serial(), rtc(), pvpanic()] {
        system_bus.extend(device);
    }
    for id in 0..config.vcpus {
        system_bus.extend(processor(id));
    }
    let mut table = Sdt::new(*b"DSDT", TABLE_HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&sleep_state_5());
    table.append_slice(&Scope::raw("_SB_".into(), system_bus));
    table.as_slice().to_vec()
}

fn sleep_state_5() -> Vec<u8> {
    let package = Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]);
    bytes(&Name::new("_S5_".into(), &package))
}

fn device(name: &str, children: Vec<&dyn Aml>) -> Vec<u8> {
    bytes(&Device::new(name.into(), children))
}

fn pci_host() -> Vec<u8> {
    let window32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MMIO32_START as u32,
        (PCI_MMIO32_START + PCI_MMIO32_BYTES - 1) as u32,
        None,
    );
    let window64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MMIO64_START,
        PCI_MMIO64_START + PCI_MMIO64_BYTES - 1,
        None,
    );
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let resources = ResourceTemplate::new(vec![&buses, &config_ports, &window32, &window64]);
    device(
        "PCI0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CBA".into(), &PCI_ECAM_START),
            &Name::new("_CRS".into(), &resources),
            &osc(),
        ],
    )
}

/// `_OSC` grants the control that we can give away; without it Linux leaves PCI Express features alone.
fn osc() -> impl Aml {
    struct Osc;
    impl Aml for Osc {
        fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
            let [status, control] = ["CDW1", "CDW3"].map(acpi_tables::aml::Path::new);
            let (uuid, buffer) = (Arg(0), Arg(3));
            Method::new(
                "_OSC".into(),
                4,
                true,
                vec![
                    &CreateDWordField::new(&status, &buffer, &0u8),
                    &If::new(
                        &Equal::new(&uuid, &Uuid::new(PCI_HOST_BRIDGE_UUID)),
                        vec![
                            &CreateDWordField::new(&control, &buffer, &8u8),
                            &And::new(&control, &control, &OSC_PCIE_CAPABILITY),
                        ],
                    ),
                    &Else::new(vec![&Or::new(&status, &status, &OSC_UNRECOGNIZED_UUID)]),
                    &Return::new(&buffer),
                ],
            )
            .to_aml_bytes(sink);
        }
    }
    Osc
}

/// Linux trusts the MCFG only where another description reserves the range, too.
fn ecam_reservation() -> Vec<u8> {
    let range = Memory32Fixed::new(true, PCI_ECAM_START as u32, PCI_ECAM_BYTES as u32);
    device(
        "ECAM",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&range])),
        ],
    )
}

fn serial() -> Vec<u8> {
    let ports = IO::new(COM1_PORT, COM1_PORT, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, COM1_PIN);
    device(
        "COM1",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
}

fn rtc() -> Vec<u8> {
    let ports = IO::new(RTC_PORT, RTC_PORT, 1, 2);
    let interrupt = Interrupt::new(true, true, false, false, RTC_PIN);
    device(
        "RTC0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
}

fn pvpanic() -> Vec<u8> {
    let port = IO::new(PANIC_PORT, PANIC_PORT, 1, 1);
    device(
        "PVPA",
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    )
}

fn processor(id: u32) -> Vec<u8> {
    let name = format!("C{id:03X}");
    device(&name, vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)])
}
