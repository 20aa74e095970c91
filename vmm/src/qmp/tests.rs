use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use tempfile::TempDir;

use super::server::Server;
use super::*;
use crate::events::{Event, EventHub};

/// Returns a command's arguments.
#[derive(Debug)]
struct Echo;

impl Executor for Echo {
    fn execute(&mut self, request: Request, reply: Reply) {
        match request.name.as_str() {
            "echo" => reply.send(Ok(request.arguments)),
            "forget" => drop(reply),
            name => reply.send(Err::<Value, _>(QmpError::not_found(name))),
        }
    }
}

/// A server whose events are handled when the test says so.
struct Site {
    directory: TempDir,
    events: EventManager<Box<dyn MutEventSubscriber>>,
    hub: EventHub,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = socket::Listener::bind(&directory.path().join("qmp")).unwrap();
        let hub = EventHub::default();
        let server = Server::new(vec![listener], &hub, Box::new(Echo)).unwrap();
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        events.add_subscriber(Box::new(server));
        Self {
            directory,
            events,
            hub,
        }
    }

    fn path(&self) -> std::path::PathBuf {
        Path::join(self.directory.path(), "qmp")
    }

    /// A client that has its greeting.
    fn connect(&mut self) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.set_nonblocking(true).unwrap();
        assert!(self.answer(&mut client)[0]["QMP"]["version"].is_object());
        client
    }

    /// One that is ready for commands.
    fn ready(&mut self) -> UnixStream {
        let mut client = self.connect();
        let answer = self.ask(&mut client, r#"{"execute": "qmp_capabilities"}"#);
        assert_eq!(answer, [json!({"return": {}})]);
        client
    }

    fn ask(&mut self, client: &mut UnixStream, text: &str) -> Vec<Value> {
        client.write_all(text.as_bytes()).unwrap();
        self.answer(client)
    }

    /// What a client gets before the server has nothing more to do.
    fn answer(&mut self, client: &mut UnixStream) -> Vec<Value> {
        while self.events.run_with_timeout(0).unwrap() > 0 {}
        let mut bytes = Vec::new();
        let _ = client.read_to_end(&mut bytes);
        let values = serde_json::Deserializer::from_slice(&bytes).into_iter();
        values.map(Result::unwrap).collect()
    }
}

#[test]
fn commands_are_carried_out_after_the_negotiation_alone() {
    let mut site = Site::new();
    let mut client = site.connect();
    let early = site.ask(&mut client, r#"{"execute": "echo", "id": 7}"#);
    assert_eq!(early[0]["error"]["class"], "CommandNotFound");
    assert_eq!(early[0]["id"], 7);
    site.ask(&mut client, r#"{"execute": "qmp_capabilities"}"#);
    let command = r#"{"execute": "echo", "arguments": {"x": [1]}, "id": {"a": "b"}}"#;
    let answer = site.ask(&mut client, command);
    assert_eq!(answer, [json!({"return": {"x": [1]}, "id": {"a": "b"}})]);
}

#[test]
fn commands_may_come_in_pieces_and_several_at_once() {
    let mut site = Site::new();
    let mut client = site.ready();
    let whole = r#"{"execute": "echo"} {"execute":"nonsense"}"#.to_owned() + "\n";
    let (first, rest) = whole.split_at(9);
    assert!(site.ask(&mut client, first).is_empty());
    let answers = site.ask(&mut client, rest);
    let desc = "The command nonsense has not been found";
    let error = json!({"error": {"class": "CommandNotFound", "desc": desc}});
    assert_eq!(answers, [json!({"return": {}}), error]);
}

#[test]
fn garbage_is_an_error_and_the_client_goes_on() {
    let mut site = Site::new();
    let mut client = site.ready();
    for garbage in ["}", "[1]", "{\"execute\": 3}", "\u{0}\u{ff}", "{]"] {
        let answers = site.ask(&mut client, garbage);
        assert_eq!(answers[0]["error"]["class"], "GenericError", "{garbage}");
        let answers = site.ask(&mut client, r#"{"execute": "echo"}"#);
        assert_eq!(answers, [json!({"return": {}})]);
    }
}

#[test]
fn reply_that_is_dropped_is_an_error() {
    let mut site = Site::new();
    let mut client = site.ready();
    let answers = site.ask(&mut client, r#"{"execute": "forget", "id": 1}"#);
    assert_eq!(answers[0]["error"]["class"], "GenericError");
    assert_eq!(answers[0]["id"], 1);
}

#[test]
fn event_comes_to_all_clients_though_one_reads_nothing() {
    let mut site = Site::new();
    let (mut reader, deaf) = (site.ready(), site.ready());
    for _ in 0..100_000 {
        site.hub.publish(Event::Powerdown);
        let got = site.answer(&mut reader);
        assert_eq!(got[0]["event"], "POWERDOWN");
    }
    drop(deaf);
}
