use std::io::{self, BufReader, Read};

/// Why a `.deb` file cannot be read (deb(5)).
#[derive(Debug, thiserror::Error)]
pub enum PackageFileError {
    #[error("it is no Debian package: it does not begin as an 'ar' archive of format 2.0")]
    NoPackage,
    #[error("its 'ar' member header at byte {0} is malformed")]
    Header(u64),
    #[error("it contains no data member")]
    NoData,
    #[error("its data member '{0}' is compressed in a way that is not supported (xz, zst, gz or none)")]
    Compression(String),
    #[error("reading it failed")]
    Io(#[from] io::Error),
}

const MAGIC: &[u8] = b"!<arch>\n";
const HEADER_BYTES: usize = 60;

/// Opens the file tree of a package: a tar stream, decompressed on the way.
pub fn data<'r, R: Read + 'r>(package: R) -> Result<Box<dyn Read + 'r>, PackageFileError> {
    let mut package = BufReader::with_capacity(256 << 10, package);
    let mut magic = [0; 8];
    package.read_exact(&mut magic).map_err(|_| PackageFileError::NoPackage)?;
    if magic != MAGIC {
        return Err(PackageFileError::NoPackage);
    }
    let mut offset = MAGIC.len() as u64;
    let mut first = true;
    loop {
        let Some((name, size)) = member(&mut package, offset)? else { return Err(PackageFileError::NoData) };
        offset += HEADER_BYTES as u64 + size + size % 2;
        if first && name != "debian-binary" {
            return Err(PackageFileError::NoPackage);
        }
        if name.starts_with("data.tar") {
            return decompress(&name, package.take(size));
        }
        if first {
            let mut version = Vec::new();
            (&mut package).take(size.min(64)).read_to_end(&mut version)?;
            if !version.starts_with(b"2.") {
                return Err(PackageFileError::NoPackage);
            }
            skip(&mut package, size - version.len() as u64 + size % 2)?;
            first = false;
        } else {
            skip(&mut package, size + size % 2)?;
        }
    }
}

fn member(source: &mut impl Read, offset: u64) -> Result<Option<(String, u64)>, PackageFileError> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    source.take(HEADER_BYTES as u64).read_to_end(&mut header)?;
    if header.is_empty() {
        return Ok(None);
    }
    let bad = || PackageFileError::Header(offset);
    let text = std::str::from_utf8(&header).map_err(|_| bad())?;
    if text.len() != HEADER_BYTES || !text.ends_with("`\n") || !text.is_ascii() {
        return Err(bad());
    }
    let name = text[..16].trim_end().trim_end_matches('/').to_owned();
    let size = text[48..58].trim_end().parse().map_err(|_| bad())?;
    Ok(Some((name, size)))
}

fn skip(source: &mut impl Read, bytes: u64) -> io::Result<()> {
    let skipped = io::copy(&mut source.take(bytes), &mut io::sink())?;
    if skipped < bytes { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn decompress<'r>(name: &str, member: impl Read + 'r) -> Result<Box<dyn Read + 'r>, PackageFileError> {
    Ok(match name {
        "data.tar" => Box::new(member),
        "data.tar.gz" => Box::new(flate2::read::GzDecoder::new(member)),
        "data.tar.xz" => Box::new(xz2::read::XzDecoder::new(member)),
        "data.tar.zst" => Box::new(zstd::Decoder::new(member)?),
        _ => return Err(PackageFileError::Compression(name.to_owned())),
    })
}

#[cfg(test)]
pub mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// Builds a package file around a data member, for the tests of this crate.
    pub fn package(member: &str, data: &[u8]) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        for (name, bytes) in [("debian-binary", &b"2.0\n"[..]), ("control.tar", b"odd"), (member, data)] {
            writeln!(file, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, bytes.len()).unwrap();
            file.extend_from_slice(bytes);
            if bytes.len() % 2 == 1 {
                file.push(b'\n');
            }
        }
        file
    }

    #[test]
    fn finds_and_decompresses_the_data_member() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(b"tree").unwrap();
        let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(b"tree").unwrap();
        for (member, bytes) in [
            ("data.tar", b"tree".to_vec()),
            ("data.tar.gz", gz.finish().unwrap()),
            ("data.tar.xz", xz.finish().unwrap()),
            ("data.tar.zst", zstd::encode_all(&b"tree"[..], 1).unwrap()),
        ] {
            let file = package(member, &bytes);
            let mut tree = Vec::new();
            data(&file[..]).unwrap().read_to_end(&mut tree).unwrap();
            assert_eq!(tree, b"tree", "{member}");
        }
    }

    #[test]
    fn refuses_what_is_no_package() {
        assert!(matches!(data(&b"hello"[..]), Err(PackageFileError::NoPackage)));
        assert!(matches!(data(&b"!<arch>\n"[..]), Err(PackageFileError::NoData)));
        assert!(matches!(data(&package("data.tar.lz4", b"")[..]), Err(PackageFileError::Compression(_))));
        assert!(matches!(data(&package("other", b"")[..]), Err(PackageFileError::NoData)));
        let file = package("data.tar", b"tree");
        assert!(matches!(data(&file[..100]), Err(PackageFileError::Header(_))));
    }

    proptest! {
        #[test]
        fn damaged_packages_are_answered(at in 0usize..260, byte: u8, cut in 0usize..260) {
            let mut file = package("data.tar", b"some data member");
            let at = at % file.len();
            file[at] = byte;
            file.truncate(cut.max(1));
            if let Ok(mut tree) = data(&file[..]) {
                let _ = io::copy(&mut tree, &mut io::sink());
            }
        }
    }
}
