use std::path::Path;

use super::*;

fn config() -> MachineConfig {
    let boot = BootConfig { kernel: "k".into(), initrd: None, cmdline: String::new(), decompressor: None };
    MachineConfig::new(boot)
}

#[test]
fn impossible_machines_are_refused() {
    assert_eq!(config().check(), Ok(()));
    assert_eq!(MachineConfig { vcpus: 0, ..config() }.check(), Err(ConfigError::NoVcpu));
    for bytes in [0, 1 << 20, (512 << 20) + 1, MAX_RAM_BYTES + 4096] {
        let error = MachineConfig { memory: ByteSize(bytes), ..config() }.check().unwrap_err();
        assert!(error.to_string().contains("--memory"), "{error}");
    }
    let vsock = Some(VsockConfig { guest_cid: 2 });
    assert_eq!(MachineConfig { vsock, ..config() }.check(), Err(ConfigError::VsockCid(2)));
}

#[test]
fn disks_in_all_shapes() {
    let disk: DiskConfig = "/a,,b.img,format=qcow2,ro,serial=one".parse().unwrap();
    assert_eq!(disk.path, Path::new("/a,b.img"));
    assert_eq!(
        (disk.format, disk.read_only, disk.serial.as_deref()),
        (Some(vireo_block::Format::Qcow2), true, Some("one"))
    );
    assert_eq!("x=y.raw".parse::<DiskConfig>().unwrap(), DiskConfig::new("x=y.raw"));
}

#[test]
fn bad_disks_say_why() {
    for (text, why) in [
        ("", "no file"),
        (",ro", "no file"),
        ("a,format=vmdk", "`vmdk`"),
        ("a,rw", "'rw'"),
        ("a,ro=1", "'ro=1'"),
        ("a,serial=", "1 to 20"),
    ] {
        let error = text.parse::<DiskConfig>().unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("PATH[,format"), "{text}: {error}");
    }
}

#[test]
fn networks_in_all_shapes() {
    assert!(NicConfig::parse("none").unwrap().is_none());
    let nic = NicConfig::parse("user,fwd=tcp:8080:80,fwd=udp:0.0.0.0:53:53,mac=52:54:00:00:00:01").unwrap().unwrap();
    assert!(matches!(&nic.backend, NicBackend::User(user) if user.forwards.len() == 2));
    assert!(nic.mac.is_some());
    let nic = NicConfig::parse("tap=vm0").unwrap().unwrap();
    assert!(matches!(nic.backend, NicBackend::Tap(name) if name == "vm0"));
    for (text, why) in [
        ("bridge", "'bridge'"),
        ("tap", "name of a tap"),
        ("tap=", "name of a tap"),
        ("tap=x,fwd=tcp:1:2", "fwd"),
        ("user,fwd=tcp:80", "guest port"),
        ("user,fwd=tcp:0:80", "host port 0"),
        ("user,mac=1:2", "MAC"),
        ("none,mac=1", "'none'"),
    ] {
        let error = NicConfig::parse(text).unwrap_err().to_string();
        assert!(error.contains(why), "{text}: {error}");
    }
}
