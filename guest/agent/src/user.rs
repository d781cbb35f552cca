//! Users, from `/etc/passwd` and `/etc/group`: a static program has no name service switch.

use std::fs;

/// Whom a command runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
    pub shell: String,
}

impl User {
    /// By name; root where none is given.
    pub fn find(name: Option<&str>) -> Result<Self, String> {
        let name = name.unwrap_or("root");
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        match Self::parse(&passwd, &group, name) {
            Some(user) => Ok(user),
            // An image without /etc/passwd still has a root.
            None if name == "root" => Ok(Self {
                name: name.into(),
                uid: 0,
                gid: 0,
                groups: vec![0],
                home: "/root".into(),
                shell: "/bin/sh".into(),
            }),
            None => Err(format!("there is no user '{name}' in the guest")),
        }
    }

    fn parse(passwd: &str, group: &str, name: &str) -> Option<Self> {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).filter(|home| !home.is_empty()).unwrap_or("/").to_owned();
        let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh").to_owned();
        let mut groups = vec![gid];
        for line in group.lines() {
            let mut fields = line.split(':').skip(2);
            let (Some(id), Some(members)) = (fields.next().and_then(|id| id.parse().ok()), fields.next()) else {
                continue;
            };
            if members.split(',').any(|member| member == name) && !groups.contains(&id) {
                groups.push(id);
            }
        }
        Some(Self { name: name.to_owned(), uid, gid, groups, home, shell })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nada:x:1000:1001:Ada,,,:/home/ada:\nbroken:x\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:bob,ada\nada:x:1001:\nx\n";

    #[test]
    fn a_user_has_groups_and_a_shell() {
        let ada = User::parse(PASSWD, GROUP, "ada").unwrap();
        assert_eq!((ada.uid, ada.gid, ada.groups), (1000, 1001, vec![1001, 27]));
        assert_eq!((ada.home.as_str(), ada.shell.as_str()), ("/home/ada", "/bin/sh"));
        assert_eq!(User::parse(PASSWD, GROUP, "root").unwrap().shell, "/bin/bash");
    }

    #[test]
    fn who_is_not_there_is_not_found() {
        assert_eq!(User::parse(PASSWD, GROUP, "eve"), None);
        assert_eq!(User::parse(PASSWD, GROUP, "broken"), None);
    }
}
