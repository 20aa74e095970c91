//! Who runs a command: `/etc/passwd` and `/etc/group`, which the C library would need other programs' code for.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::process::{Gid, Uid, geteuid};

/// Why there is no such user.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// It is in no file.
    #[error("no user is called {0:?} in the guest's /etc/passwd")]
    User(String),
    /// The same.
    #[error("no group is called {0:?} in the guest's /etc/group")]
    Group(String),
}

/// Who runs a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: Uid,
    /// That of its first group.
    pub gid: Gid,
    /// Those of its other groups.
    pub groups: Vec<Gid>,
    /// Its name, or its number as a text.
    pub name: Vec<u8>,
    /// Its home.
    pub home: Vec<u8>,
}

impl User {
    /// `USER[:GROUP]` of this system, or the agent's own.
    ///
    /// # Errors
    ///
    /// See [`UserError`].
    pub fn find(text: Option<&str>) -> Result<Self, UserError> {
        // A system without these files has numbers alone.
        let read = |path: &str| fs::read(Path::new(path)).unwrap_or_default();
        let (passwd, group) = (read("/etc/passwd"), read("/etc/group"));
        match text {
            Some(text) => Self::find_in(text, &passwd, &group),
            None => Self::find_in(&geteuid().as_raw().to_string(), &passwd, &group),
        }
    }

    fn find_in(text: &str, passwd: &[u8], group: &[u8]) -> Result<Self, UserError> {
        let (user, chosen) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let number = number(user.as_bytes());
        let of_name = entries(passwd).find(|entry| entry[0] == user.as_bytes());
        let of_number = || entries(passwd).find(|entry| number.is_some() && id(entry, 2) == number);
        let entry = of_name.or_else(of_number);
        let uid = entry.as_ref().map_or(number, |entry| id(entry, 2));
        let uid = uid.ok_or_else(|| UserError::User(user.to_owned()))?;
        let field = |index: usize| entry.as_ref()?.get(index).copied();
        let name = field(0).unwrap_or(user.as_bytes()).to_vec();
        let home = field(5).filter(|home| !home.is_empty()).unwrap_or(b"/");
        let (gid, groups) = match chosen {
            Some(chosen) => (group_id(chosen, group)?, Vec::new()),
            None => {
                let gid = entry.as_ref().and_then(|entry| id(entry, 3)).unwrap_or(0);
                (gid, groups_of(&name, group))
            }
        };
        Ok(Self {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: groups.into_iter().map(Gid::from_raw).collect(),
            home: home.to_vec(),
            name,
        })
    }

    /// What its commands find in their environment.
    pub fn environment(&self) -> [(&'static str, &std::ffi::OsStr); 4] {
        let text = std::ffi::OsStr::from_bytes;
        [
            ("HOME", text(&self.home)),
            ("USER", text(&self.name)),
            ("LOGNAME", text(&self.name)),
            ("PATH", text(PATH)),
        ]
    }
}

/// Where a command is looked for, as of Docker.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The fields of each line (passwd(5), group(5)).
fn entries(file: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    let lines = file.split(|byte| *byte == b'\n');
    lines.map(|line| line.split(|byte| *byte == b':').collect())
}

fn number(text: &[u8]) -> Option<u32> {
    // The last number is none (setuid(2)).
    let number = str::from_utf8(text).ok()?.parse().ok();
    number.filter(|number| *number != u32::MAX)
}

fn id(entry: &[&[u8]], index: usize) -> Option<u32> {
    number(entry.get(index)?)
}

fn group_id(text: &str, file: &[u8]) -> Result<u32, UserError> {
    let entry = entries(file).find(|entry| entry[0] == text.as_bytes());
    let found = entry.map_or_else(|| number(text.as_bytes()), |entry| id(&entry, 2));
    found.ok_or_else(|| UserError::Group(text.to_owned()))
}

fn groups_of(name: &[u8], file: &[u8]) -> Vec<u32> {
    let has_it = |entry: &Vec<&[u8]>| {
        let members = entry.get(3).copied().unwrap_or_default();
        members.split(|byte| *byte == b',').any(|it| it == name)
    };
    let found = entries(file).filter(has_it);
    found.filter_map(|entry| id(&entry, 2)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nme:x:1000:100::/home/me:/bin/sh\n\
        7:x:1007:7::/home/seven:/bin/sh\nodd:x:1001:1001:::\nbad:x:y:z\n:\n";
    const GROUP: &[u8] = b"root:x:0:\nusers:x:100:\nwheel:x:10:root,me\nkvm:x:104:me\nbad\n";

    fn find(text: &str) -> Result<(u32, u32, Vec<u32>, String), UserError> {
        let user = User::find_in(text, PASSWD, GROUP)?;
        let groups = user.groups.iter().map(|gid| gid.as_raw()).collect();
        let home = String::from_utf8(user.home).unwrap();
        Ok((user.uid.as_raw(), user.gid.as_raw(), groups, home))
    }

    #[test]
    fn users_are_found_by_name_and_by_number_with_their_groups() {
        let me = (1000, 100, vec![10, 104], "/home/me".to_owned());
        assert_eq!(find("me"), Ok(me.clone()));
        assert_eq!(find("1000"), Ok(me));
        assert_eq!(find("0"), Ok((0, 0, vec![10], "/root".into())));
        // A name of digits is a name first.
        assert_eq!(find("7"), Ok((1007, 7, vec![], "/home/seven".into())));
        assert_eq!(find("odd"), Ok((1001, 1001, vec![], "/".into())));
        assert_eq!(find("4000"), Ok((4000, 0, vec![], "/".into())));
    }

    #[test]
    fn chosen_group_is_the_only_one() {
        assert_eq!(find("me:kvm"), Ok((1000, 104, vec![], "/home/me".into())));
        assert_eq!(find("me:5"), Ok((1000, 5, vec![], "/home/me".into())));
    }

    #[test]
    fn missing_ones_are_named() {
        for text in ["you", "", "bad", "4294967295", "-1"] {
            assert_eq!(find(text), Err(UserError::User(text.into())));
        }
        assert_eq!(find("me:you"), Err(UserError::Group("you".into())));
        assert_eq!(find("me:"), Err(UserError::Group(String::new())));
    }
}
