//! The initial RAM file system: busybox, a script and the few drivers that lead to the root file system.
//!
//! It is written here rather than by the guest's initramfs-tools because every instruction in it is paid for at each
//! boot: no udev, no hooks, no compression (the archive is 2 to 3 MiB, and the VMM places it in guest memory at the
//! host's speed).

use std::{
    collections::{BTreeMap, HashSet},
    io::{self, Read},
};

use super::cpio::CpioWriter;

/// Why no initrd can be made of a kernel package.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    #[error("the kernel package contains no '{0}'")]
    Missing(&'static str),
    #[error("the kernel package contains neither as a module nor built in what the initrd needs: '{0}'")]
    Module(String),
    #[error("busybox-static contains no busybox")]
    NoBusybox,
    #[error("the module '{module}' cannot be decompressed")]
    Compressed { module: String, source: io::Error },
    #[error("reading the package failed")]
    Io(#[from] io::Error),
}

/// What the initrd loads, by the variable of `init.sh` that lists it. The second column is loaded where it is a module.
const DRIVERS: [(&str, &[&str]); 6] = [
    // pvpanic: the host hears of a panic from here on.
    ("always", &["virtio_pci", "crc32c_generic", "ext4", "pvpanic_mmio"]),
    ("net", &["virtio_net"]),
    ("block", &["virtio_blk"]),
    ("console", &["virtio_console"]),
    ("rng", &["virtio_rng"]),
    ("vsock", &["vmw_vsock_virtio_transport"]),
];

/// Drivers that may be absent altogether: newer kernels have folded this one into their library of checksums.
const OPTIONAL: [&str; 2] = ["crc32c_generic", "pvpanic_mmio"];

/// Folders of modules from which the drivers above and what they need can come.
const FOLDERS: [&str; 13] = [
    "kernel/arch/x86/crypto/",
    "kernel/crypto/",
    "kernel/drivers/block/",
    "kernel/drivers/char/",
    "kernel/drivers/misc/pvpanic/",
    "kernel/drivers/net/net_failover",
    "kernel/drivers/net/virtio_net",
    "kernel/drivers/virtio/",
    "kernel/fs/ext4/",
    "kernel/fs/",
    "kernel/lib/",
    "kernel/net/core/",
    "kernel/net/vmw_vsock/",
];

const APPLETS: [&str; 10] = ["cat", "findfs", "insmod", "ip", "ls", "mkdir", "mount", "sh", "switch_root", "usleep"];

/// What an image takes from a kernel package.
pub struct KernelFiles {
    pub version: String,
    pub vmlinuz: Vec<u8>,
    modules: BTreeMap<String, Vec<u8>>,
    builtin: HashSet<String>,
}

/// The name of a module as the kernel and `depends=` write it.
fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|suffix| file.strip_suffix(suffix))?;
    Some(stem.replace('-', "_"))
}

impl KernelFiles {
    /// Reads them from the data member of a `linux-image` package.
    pub fn read(data: impl Read) -> Result<Self, InitrdError> {
        let mut kernel = None;
        let mut modules = BTreeMap::new();
        let mut builtin = HashSet::new();
        let mut archive = tar::Archive::new(data);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = entry.path()?.display().to_string();
            let path = path.trim_start_matches("./");
            let mut content = || {
                let mut bytes = Vec::new();
                (&mut entry).take(256 << 20).read_to_end(&mut bytes).map(|_| bytes)
            };
            if let Some(version) = path.strip_prefix("boot/vmlinuz-") {
                kernel = Some((version.to_owned(), content()?));
            } else if path.ends_with("/modules.builtin") {
                builtin.extend(String::from_utf8_lossy(&content()?).lines().filter_map(module_name));
            } else if let (Some(at), Some(name)) = (path.find("kernel/"), module_name(path))
                && FOLDERS.iter().any(|folder| path[at..].starts_with(folder))
            {
                modules.insert(
                    name.clone(),
                    decompress(path, content()?).map_err(|source| InitrdError::Compressed { module: name, source })?,
                );
            }
        }
        let (version, vmlinuz) = kernel.ok_or(InitrdError::Missing("boot/vmlinuz-*"))?;
        Ok(Self { version, vmlinuz, modules, builtin })
    }

    /// The module with those it needs before it; nothing where it is built in.
    fn load_order(&self, name: &str) -> Result<Vec<&str>, InitrdError> {
        let mut order = Vec::new();
        let mut visiting = Vec::new();
        self.visit(name, &mut visiting, &mut order)?;
        Ok(order)
    }

    fn visit<'a>(
        &'a self,
        name: &str,
        visiting: &mut Vec<String>,
        order: &mut Vec<&'a str>,
    ) -> Result<(), InitrdError> {
        let Some((own_name, bytes)) = self.modules.get_key_value(name) else {
            let known = self.builtin.contains(name) || OPTIONAL.contains(&name);
            return if known { Ok(()) } else { Err(InitrdError::Module(name.to_owned())) };
        };
        if order.contains(&own_name.as_str()) || visiting.iter().any(|v| v == name) {
            return Ok(());
        }
        visiting.push(name.to_owned());
        for dependency in depends(bytes) {
            self.visit(&dependency, visiting, order)?;
        }
        visiting.pop();
        order.push(own_name);
        Ok(())
    }

    /// The whole initrd, the same bytes for the same packages.
    pub fn initrd(&self, busybox: &[u8]) -> Result<Vec<u8>, InitrdError> {
        let mut needed: Vec<&str> = Vec::new();
        let mut lists = String::new();
        for (variable, drivers) in DRIVERS {
            let mut order: Vec<&str> = Vec::new();
            for driver in drivers {
                let new = self.load_order(driver)?;
                order.extend(new.into_iter().filter(|name| !order.contains(name)).collect::<Vec<_>>());
            }
            lists.push_str(&format!("{variable}=\"{}\"\n", order.join(" ")));
            needed.extend(order);
        }
        needed.sort_unstable();
        needed.dedup();
        let script = include_str!("init.sh").replacen("export PATH=/bin\n", &format!("export PATH=/bin\n{lists}"), 1);
        let mut cpio = CpioWriter::new(Vec::new());
        for directory in ["bin", "dev", "modules", "proc", "root", "run", "sys"] {
            cpio.directory(directory)?;
        }
        cpio.character_device("dev/console", 5, 1)?;
        cpio.file("bin/busybox", 0o755, busybox)?;
        for applet in APPLETS {
            cpio.symlink(&format!("bin/{applet}"), "busybox")?;
        }
        for name in needed {
            cpio.file(&format!("modules/{name}.ko"), 0o644, &self.modules[name])?;
        }
        cpio.file("init", 0o755, script.as_bytes())?;
        Ok(cpio.finish()?)
    }
}

/// Modules are signed before they are compressed, so the kernel takes them as well without the compression.
fn decompress(path: &str, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let reader: Box<dyn Read + '_> = match path.rsplit('.').next() {
        Some("xz") => Box::new(xz2::read::XzDecoder::new(&bytes[..])),
        Some("zst") => Box::new(zstd::Decoder::new(&bytes[..])?),
        Some("gz") => Box::new(flate2::read::GzDecoder::new(&bytes[..])),
        _ => return Ok(bytes),
    };
    let mut plain = Vec::new();
    reader.take(64 << 20).read_to_end(&mut plain)?;
    Ok(plain)
}

/// The modules that a module names in the `depends=` entry of its `.modinfo` section.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    // `.modinfo` is a run of NUL-terminated strings; the key occurs nowhere else with a NUL before it.
    let Some(at) = module.windows(key.len()).position(|window| window == key) else { return Vec::new() };
    let value = &module[at + key.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&value[..end]);
    text.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// The busybox program from the data member of `busybox-static`.
pub fn busybox(data: impl Read) -> Result<Vec<u8>, InitrdError> {
    let mut archive = tar::Archive::new(data);
    for entry in archive.entries()? {
        let entry = entry?;
        let path = entry.path()?.display().to_string();
        if ["bin/busybox", "usr/bin/busybox"].contains(&path.trim_start_matches("./"))
            && entry.header().entry_type().is_file()
        {
            let mut bytes = Vec::new();
            entry.take(64 << 20).read_to_end(&mut bytes)?;
            return Ok(bytes);
        }
    }
    Err(InitrdError::NoBusybox)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(modules: &[(&str, &str)], builtin: &str) -> KernelFiles {
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |path: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, bytes).unwrap();
        };
        add("./boot/vmlinuz-6.1.0-1-cloud-amd64", b"kernel");
        for (path, depends) in modules {
            let module = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            let bytes = if path.ends_with(".xz") {
                let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
                io::Write::write_all(&mut xz, module.as_bytes()).unwrap();
                xz.finish().unwrap()
            } else {
                module.into_bytes()
            };
            add(&format!("./lib/modules/6.1/kernel/{path}"), &bytes);
        }
        add("./lib/modules/6.1/modules.builtin", builtin.as_bytes());
        KernelFiles::read(&builder.into_inner().unwrap()[..]).unwrap()
    }

    const BUILTIN: &str = "kernel/fs/ext4/ext4.ko\nkernel/drivers/char/virtio_console.ko\nkernel/drivers/char/hw_random/virtio-rng.ko\n\
                           kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko\nkernel/drivers/net/virtio_net.ko\n";

    #[test]
    fn loads_dependencies_first_and_skips_what_is_built_in() {
        let kernel = kernel(
            &[
                ("drivers/virtio/virtio_pci.ko", "virtio_ring,virtio"),
                ("drivers/virtio/virtio_ring.ko.xz", "virtio"),
                ("drivers/virtio/virtio.ko", ""),
                ("drivers/block/virtio_blk.ko", "virtio-ring"),
                ("sound/soundcore.ko", ""),
            ],
            BUILTIN,
        );
        assert_eq!(kernel.version, "6.1.0-1-cloud-amd64");
        assert_eq!(kernel.load_order("virtio_pci").unwrap(), ["virtio", "virtio_ring", "virtio_pci"]);
        assert!(kernel.load_order("ext4").unwrap().is_empty());
        let initrd = kernel.initrd(b"busybox").unwrap();
        let text = String::from_utf8_lossy(&initrd);
        assert!(text.contains("always=\"virtio virtio_ring virtio_pci\"\n"));
        assert!(text.contains("block=\"virtio virtio_ring virtio_blk\"\n"));
        assert!(text.contains("modules/virtio_blk.ko") && !text.contains("soundcore"));
        assert_eq!(initrd, kernel.initrd(b"busybox").unwrap());
    }

    #[test]
    fn a_driver_that_is_nowhere_is_named() {
        let kernel = kernel(&[("drivers/virtio/virtio_pci.ko", "ghost")], BUILTIN);
        assert_eq!(
            kernel.initrd(b"").unwrap_err().to_string(),
            "the kernel package contains neither as a module nor built in what the initrd needs: 'ghost'"
        );
    }

    #[test]
    fn a_dependency_cycle_ends() {
        let kernel = kernel(&[("drivers/virtio/a.ko", "b"), ("drivers/virtio/b.ko", "a")], BUILTIN);
        assert_eq!(kernel.load_order("a").unwrap(), ["b", "a"]);
    }
}
