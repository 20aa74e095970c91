//! Neighbour entries and policy rules, as the kernel's own messages: who moves one must lose nothing of it.

use std::io;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};

use super::Netlink;
use super::ip::parse;
use super::reading::Request;

/// Size of `struct ndmsg`, which the attributes follow, and where its `ndm_flags` are.
const NEIGHBOUR_HEADER: usize = 12;
const NEIGHBOUR_FLAGS: usize = 10;

/// Size of `struct fib_rule_hdr`, which the attributes follow.
const RULE_HEADER: usize = 12;

impl Netlink {
    /// All neighbour entries of the namespace, the learnt and the given ones and the proxies.
    pub(crate) fn neighbours(&self) -> io::Result<Vec<NeighbourMessage>> {
        let mut all = Vec::new();
        for flags in [0, libc::NTF_PROXY] {
            let mut body = vec![0; NEIGHBOUR_HEADER];
            body[NEIGHBOUR_FLAGS] = flags;
            let request = Request {
                kind: libc::RTM_GETNEIGH,
                flags: libc::NLM_F_DUMP,
                body,
                answer: libc::RTM_NEWNEIGH,
            };
            all.extend(self.ask(request, parse_neighbour)?);
        }
        Ok(all)
    }

    /// All policy rules of the namespace, of both families. A kernel without such rules has none.
    pub(crate) fn rules(&self) -> io::Result<Vec<RuleMessage>> {
        let mut rules = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut body = vec![0; RULE_HEADER];
            body[0] = family as u8;
            let request = Request {
                kind: libc::RTM_GETRULE,
                flags: libc::NLM_F_DUMP,
                body,
                answer: libc::RTM_NEWRULE,
            };
            match self.ask(request, parse_rule) {
                Ok(part) => rules.extend(part),
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(rules)
    }

    /// Gives a link a neighbour entry, in place of one that it may have learnt.
    pub(crate) fn add_neighbour(&self, neighbour: &NeighbourMessage) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewNeighbour(neighbour.clone());
        self.change(message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes a neighbour entry away.
    pub(crate) fn delete_neighbour(&self, neighbour: &NeighbourMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::DelNeighbour(neighbour.clone()), 0)
    }

    /// Adds a policy rule. The very same one is an error.
    pub(crate) fn add_rule(&self, rule: &RuleMessage) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewRule(rule.clone());
        self.change(message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Takes a policy rule away.
    pub(crate) fn delete_rule(&self, rule: &RuleMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::DelRule(rule.clone()), 0)
    }
}

fn parse_neighbour(body: &[u8]) -> Option<NeighbourMessage> {
    let attributes = |message: &mut NeighbourMessage| std::mem::take(&mut message.attributes);
    let (mut message, all) = parse(
        body,
        NEIGHBOUR_HEADER,
        attributes,
        NeighbourAttribute::Other,
    )?;
    message.attributes = all;
    Some(message)
}

fn parse_rule(body: &[u8]) -> Option<RuleMessage> {
    let attributes = |message: &mut RuleMessage| std::mem::take(&mut message.attributes);
    let (mut message, all) = parse(body, RULE_HEADER, attributes, RuleAttribute::Other)?;
    message.attributes = all;
    Some(message)
}
