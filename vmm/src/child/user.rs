//! Whose a program is, and what it may do.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::unistd::{
    Gid, Group, Uid, getegid, geteuid, getgrouplist, setgroups, setresgid, setresuid,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs,
};

/// Why a program cannot run as a user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("there is no user {0:?}")]
    NoUser(String),
    #[error("there is no group {0:?}")]
    NoGroup(String),
    #[error("cannot look up the user {0:?}")]
    LookUp(String, #[source] io::Error),
}

/// Everything that makes a process a user's.
#[derive(Debug)]
pub struct User {
    name: String,
    home: PathBuf,
    user: Uid,
    group: Gid,
    groups: Vec<Gid>,
}

impl User {
    /// Of `USER` or `USER:GROUP`, each a name or a number, as chown(1) has it: a name that consists of digits is a name
    /// first. A number need not be known; its group has the same number then, unless there is a `GROUP`.
    pub fn parse(text: &str) -> Result<Self, UserError> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let failed = |errno: Errno| UserError::LookUp(text.to_owned(), errno.into());
        let group = group.map(|group| find_group(group, failed)).transpose()?;
        let number = || number(user).map(Uid::from_raw);
        let mut known = nix::unistd::User::from_name(user).map_err(failed)?;
        if let (None, Some(number)) = (&known, number()) {
            known = nix::unistd::User::from_uid(number).map_err(failed)?;
        }
        let Some(known) = known else {
            let id = number().ok_or_else(|| UserError::NoUser(user.to_owned()))?;
            return Ok(Self::unknown(id, group));
        };
        let group = group.unwrap_or(known.gid);
        let name = CString::new(known.name.clone());
        let name = name.map_err(|_| UserError::NoUser(user.to_owned()))?;
        Ok(Self {
            groups: getgrouplist(&name, group).map_err(failed)?,
            name: known.name,
            home: known.dir,
            user: known.uid,
            group,
        })
    }

    fn unknown(user: Uid, group: Option<Gid>) -> Self {
        let group = group.unwrap_or(Gid::from_raw(user.as_raw()));
        Self {
            name: user.to_string(),
            home: "/".into(),
            user,
            group,
            groups: vec![group],
        }
    }

    /// The user's number.
    pub fn id(&self) -> u32 {
        self.user.as_raw()
    }

    /// The number of the first group.
    pub fn group_id(&self) -> u32 {
        self.group.as_raw()
    }

    /// Sets the user's variables: root's directories are not open to the program. `runtime` is where
    /// users' own ones are, if they are logged in.
    pub fn settle(&self, program: &mut Command, runtime: &Path) {
        program
            .env("USER", &self.name)
            .env("LOGNAME", &self.name)
            .env("HOME", &self.home);
        let runtime = runtime.join(self.user.to_string());
        if runtime.is_dir() {
            program.env("XDG_RUNTIME_DIR", runtime);
        } else {
            program.env_remove("XDG_RUNTIME_DIR");
        }
    }

    /// Whether this process is the user already, and no root that could take another's groups.
    fn is_me(&self) -> bool {
        !self.user.is_root() && self.user == geteuid() && self.group == getegid()
    }
}

fn find_group(text: &str, failed: impl Fn(Errno) -> UserError) -> Result<Gid, UserError> {
    let known = Group::from_name(text).map_err(failed)?;
    known
        .map(|group| group.gid)
        .or_else(|| number(text).map(Gid::from_raw))
        .ok_or_else(|| UserError::NoGroup(text.to_owned()))
}

/// An id. The largest is none: the kernel takes it for "leave it as it is", which would be root's.
fn number(text: &str) -> Option<u32> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| is_number)?;
    (number != u32::MAX).then_some(number)
}

/// Becomes the user, if one is named, without any capability: those of this process, of its user or in its ambient set, are
/// for minivmm's own work. Only root's programs have root's, which exec gives them in any case, but they inherit
/// none beyond. Runs between fork and exec.
pub(super) fn enter(user: Option<&User>, no_new_privs: bool) -> io::Result<()> {
    let becomes_root = user.map_or_else(geteuid, |user| user.user).is_root();
    if !becomes_root {
        empty_bounding_set()?;
    }
    if let Some(user) = user.filter(|user| !user.is_me()) {
        setgroups(&user.groups)?;
        setresgid(user.group, user.group, user.group)?;
        setresuid(user.user, user.user, user.user)?;
    }
    let mut sets = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    if becomes_root {
        let own = capabilities(None)?;
        (sets.effective, sets.permitted) = (own.effective, own.permitted);
    }
    // The ambient set never has more than the inheritable one.
    set_capabilities(None, sets)?;
    if no_new_privs && !becomes_root {
        set_no_new_privs(true)?;
    }
    Ok(())
}

/// Without CAP_SETPCAP it stays: it gives nothing to a process without capabilities that gets no new ones.
fn empty_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: it takes numbers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } == 0 {
            continue;
        }
        return match Errno::last() {
            // It was the last one that the kernel knows.
            Errno::EINVAL | Errno::EPERM => Ok(()),
            errno => Err(errno.into()),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> User {
        User {
            name: "me".into(),
            ..User::unknown(Uid::from_raw(4711), None)
        }
    }

    #[test]
    fn user_by_an_unknown_number_gets_the_group_of_that_number() {
        let user = User::parse("3999999999").unwrap();
        assert_eq!((user.id(), user.group_id()), (3_999_999_999, 3_999_999_999));
        assert_eq!(user.groups, [user.group]);
        let user = User::parse("3999999999:12").unwrap();
        assert_eq!((user.id(), user.group_id()), (3_999_999_999, 12));
        assert_eq!(user.home, Path::new("/"));
    }

    #[test]
    fn user_that_would_leave_root_as_it_is_does_not_exist() {
        for text in ["4294967295", "-1", "+1", "", ":1", "4294967296", "no such"] {
            let refused = User::parse(text);
            assert!(matches!(refused, Err(UserError::NoUser(_))), "{text}");
        }
        for text in ["1:4294967295", "1:", "1:-1", "root:no such"] {
            let refused = User::parse(text);
            assert!(matches!(refused, Err(UserError::NoGroup(_))), "{text}");
        }
    }

    #[test]
    fn program_gets_the_variables_of_its_user() {
        let user = me();
        let runtime = tempfile::tempdir().unwrap();
        let variable_of = |name: &str| {
            let mut program = Command::new("true");
            program.env("XDG_RUNTIME_DIR", "/run/user/0");
            user.settle(&mut program, runtime.path());
            let found = program.get_envs().find(|(variable, _)| *variable == name);
            found.unwrap().1.map(ToOwned::to_owned)
        };
        for (name, value) in [("USER", "me"), ("LOGNAME", "me"), ("HOME", "/")] {
            assert_eq!(variable_of(name), Some(value.into()), "{name}");
        }
        assert_eq!(variable_of("XDG_RUNTIME_DIR"), None);
        let own = runtime.path().join("4711");
        std::fs::create_dir(&own).unwrap();
        assert_eq!(variable_of("XDG_RUNTIME_DIR"), Some(own.into()));
    }
}
