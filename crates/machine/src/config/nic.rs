use std::str::FromStr;

use vireo_packet::{Forward, MacAddress, UserNetConfig};

use super::split_options;

/// Where a NIC's frames go.
#[derive(Clone, Debug)]
pub enum NicBackend {
    /// User-mode NAT inside this process; needs no rights.
    User(Box<UserNetConfig>),
    /// A tap device of the host, made beforehand.
    Tap(String),
}

/// A virtio network card.
#[derive(Clone, Debug)]
pub struct NicConfig {
    pub backend: NicBackend,
    /// `None` takes one that follows from the NIC's number, the same at each start.
    pub mac: Option<MacAddress>,
}

impl NicConfig {
    pub fn new(backend: NicBackend) -> Self {
        Self { backend, mac: None }
    }

    /// Reads `none`, `user[,fwd=…]…` or `tap=NAME`, each with `,mac=ADDRESS` if wanted; `None` stands for `none`.
    pub fn parse(text: &str) -> Result<Option<Self>, NicSpecError> {
        if text == "none" { Ok(None) } else { text.parse().map(Some) }
    }
}

/// Why a text is no NIC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no network: {why}; write none, user[,fwd=tcp:HOSTPORT:GUESTPORT]… or tap=NAME")]
pub struct NicSpecError {
    text: String,
    why: String,
}

impl FromStr for NicConfig {
    type Err = NicSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |why: String| NicSpecError { text: text.to_owned(), why };
        let mut parts = split_options(text).into_iter();
        let kind = parts.next().unwrap_or_default();
        let mut nic = Self::new(match kind.split_once('=').unwrap_or((&kind, "")) {
            ("user", "") => NicBackend::User(Box::default()),
            ("tap", name) if !name.is_empty() => NicBackend::Tap(name.to_owned()),
            ("tap", _) => return Err(fail("tap needs the name of a tap device".into())),
            _ => return Err(fail(format!("'{kind}' is not known"))),
        });
        for option in parts {
            match (option.split_once('=').unwrap_or((&option, "")), &mut nic.backend) {
                (("mac", mac), _) => nic.mac = Some(mac.parse().map_err(|e| fail(format!("{e}")))?),
                (("fwd", forward), NicBackend::User(user)) => {
                    let forward = forward.parse::<Forward>().map_err(|e| fail(format!("{e}")))?;
                    if forward.host_port == 0 {
                        return Err(fail(
                            "host port 0 would be one that nobody is told; give one from 1 to 65535".into(),
                        ));
                    }
                    user.forwards.push(forward);
                }
                (("restrict", ""), NicBackend::User(user)) => user.restrict = true,
                _ => return Err(fail(format!("the option '{option}' is not known here"))),
            }
        }
        Ok(nic)
    }
}
