//! What the guest remembers, written down and read again.

use std::io;

use virtiofsd::filesystem::ROOT_ID;

use super::{Nodes, Place, error};

impl Nodes {
    /// Writes down what is remembered. No request is being served, and what can be closed is.
    pub fn save(&self) -> io::Result<Vec<u8>> {
        postcard::to_stdvec(self).map_err(io::Error::other)
    }

    /// What has been written down, with the budget of these. Whatever it says, its numbers lead to files, and no directory is
    /// below itself.
    pub fn restored(&self, saved: &[u8]) -> io::Result<Self> {
        let mut nodes: Self = postcard::from_bytes(saved).map_err(io::Error::other)?;
        nodes.budget = self.budget;
        match nodes.relate() {
            Some(()) => Ok(nodes),
            None => Err(error(libc::EINVAL)),
        }
    }

    /// Fills in what follows from what is written down. `None` if some of it contradicts the rest.
    fn relate(&mut self) -> Option<()> {
        let root = self.nodes.get_mut(&ROOT_ID)?;
        root.uses = 1;
        for id in self.handles.values() {
            self.nodes.get_mut(id)?.uses += 1;
        }
        let (mut placed, mut above) = (Vec::new(), Vec::new());
        for (&id, node) in &self.nodes {
            match node.opened {
                Some(opened) => self.opened.insert(opened.inode, id),
                None => self.closed.insert(node.identity.0, id),
            };
            match node.place.clone() {
                Some(place) => placed.push((id, place)),
                None => above.push(id),
            }
        }
        for (id, Place { directory, name }) in placed {
            let there = &mut self.nodes.get_mut(&directory)?.children;
            there.insert(name, id).is_none().then_some(())?;
        }
        // From those without a place, all are reached.
        let mut reached = 0;
        while let Some(id) = above.pop() {
            above.extend(self.nodes.get(&id)?.children.values());
            reached += 1;
        }
        let is_next = self.nodes.keys().all(|id| *id < self.next) && self.next < 1 << 63;
        let is_root = self.opened.get(&ROOT_ID) == Some(&ROOT_ID);
        (reached == self.nodes.len() && is_next && is_root).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use virtiofsd::fuse::Attr;

    use super::*;

    fn directory(ino: u64) -> Attr {
        Attr {
            ino,
            mode: libc::S_IFDIR,
            ..Attr::default()
        }
    }

    /// The root, `a` in it with the number 2, and `a/b` with a number above it, all that can be closed closed.
    fn nodes() -> (Nodes, u64, u64) {
        let mut nodes = Nodes::new(100);
        let a = nodes.found(ROOT_ID, c"a", 10, &directory(1000));
        let b = nodes.found(a, c"b", 11, &directory(1001));
        nodes.close_idle();
        (nodes, a, b)
    }

    /// All of it but the budget.
    fn in_order(nodes: &Nodes) -> String {
        let all: BTreeMap<_, _> = nodes.nodes.iter().collect();
        let sorted = |map: &HashMap<u64, u64>| map.clone().into_iter().collect::<BTreeMap<_, _>>();
        let [opened, closed, handles] = [&nodes.opened, &nodes.closed, &nodes.handles].map(sorted);
        let (idle, next) = (&nodes.idle, nodes.next);
        format!("{all:?} {opened:?} {closed:?} {handles:?} {idle:?} {next}")
    }

    #[test]
    fn what_is_saved_is_what_is_restored() {
        let (mut nodes, a, b) = nodes();
        // Open, and without a place.
        let c = nodes.found(ROOT_ID, c"c", 12, &directory(1002));
        nodes.add_handle(c, 7);
        nodes.unnamed(ROOT_ID, c"c");
        let saved = nodes.save().unwrap();
        let restored = Nodes::new(50).restored(&saved).unwrap();
        assert_eq!(restored.budget, 50);
        assert_eq!(in_order(&restored), in_order(&nodes));
        assert_eq!(restored.closed_from(b).unwrap(), [b, a]);
        assert_eq!(restored.inode_of_handle(c, 7).unwrap(), 12);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let changes: [fn(&mut Nodes, u64, u64); 7] = [
            |nodes, _, _| drop(nodes.nodes.remove(&ROOT_ID)),
            |nodes, a, _| nodes.nodes.get_mut(&ROOT_ID).unwrap().opened = nodes.nodes[&a].opened,
            |nodes, a, _| drop(nodes.nodes.remove(&a)),
            |nodes, a, b| {
                nodes
                    .nodes
                    .get_mut(&a)
                    .unwrap()
                    .place
                    .as_mut()
                    .unwrap()
                    .directory = b
            },
            |nodes, a, b| nodes.nodes.get_mut(&b).unwrap().place = nodes.nodes[&a].place.clone(),
            |nodes, _, _| assert!(nodes.handles.insert(7, 99).is_none()),
            |nodes, _, b| nodes.next = b,
        ];
        for (number, change) in changes.iter().enumerate() {
            let (mut nodes, a, b) = nodes();
            change(&mut nodes, a, b);
            let restored = Nodes::new(100).restored(&nodes.save().unwrap());
            assert_eq!(
                restored.unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "{number}"
            );
        }
        let saved = nodes().0.save().unwrap();
        for end in 0..saved.len() {
            Nodes::new(100).restored(&saved[..end]).unwrap_err();
        }
    }
}
