use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use tempfile::TempDir;

use super::server::Server;
use super::*;
use crate::events::{Event, EventHub};

/// Returns a command's arguments, or keeps the reply until another command.
#[derive(Debug, Default)]
struct Echo(Vec<Reply>);

impl Executor for Echo {
    fn execute(&mut self, request: Request, reply: Reply) {
        match request.name.as_str() {
            "echo" => reply.send(Ok(request.arguments)),
            "forget" => drop(reply),
            "hold" => self.0.push(reply),
            "release" => {
                self.0.drain(..).for_each(|held| held.send(Ok("held")));
                reply.send(Ok(json!({})));
            }
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
        let server = Server::new(vec![listener], &hub, Box::new(Echo::default())).unwrap();
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

    /// What a client gets that goes then.
    fn ready_and_ask(&mut self, text: &str) -> Vec<Value> {
        let mut client = self.ready();
        self.ask(&mut client, text)
    }

    fn ask(&mut self, client: &mut UnixStream, text: &str) -> Vec<Value> {
        client.write_all(text.as_bytes()).unwrap();
        self.answer(client)
    }

    /// What a client gets before the server has nothing more to do.
    fn answer(&mut self, client: &mut UnixStream) -> Vec<Value> {
        while self.events.run_with_timeout(0).unwrap() > 0 {}
        received(client)
    }
}

fn received(client: &mut UnixStream) -> Vec<Value> {
    let mut bytes = Vec::new();
    let _ = client.read_to_end(&mut bytes);
    let values = serde_json::Deserializer::from_slice(&bytes).into_iter();
    values.map(Result::unwrap).collect()
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

#[test]
fn result_that_comes_during_anothers_command_is_sent() {
    let mut site = Site::new();
    let (mut patient, mut other) = (site.ready(), site.ready());
    assert!(
        site.ask(&mut patient, r#"{"execute": "hold", "id": 1}"#)
            .is_empty()
    );
    site.ask(&mut other, r#"{"execute": "release"}"#);
    let answer = site.answer(&mut patient);
    assert_eq!(answer, [json!({"return": "held", "id": 1})]);
}

#[test]
fn client_that_sends_much_at_once_leaves_others_their_turn() {
    let mut site = Site::new();
    let (mut greedy, mut modest) = (site.ready(), site.ready());
    let command = r#"{"execute": "echo"}"#;
    greedy.write_all(command.repeat(500).as_bytes()).unwrap();
    modest.write_all(command.as_bytes()).unwrap();
    site.events.run_with_timeout(0).unwrap();
    assert_eq!(received(&mut modest).len(), 1);
    let first = received(&mut greedy).len();
    assert!((1..100).contains(&first), "{first}");
    assert_eq!(site.answer(&mut greedy).len(), 500 - first);
}

#[test]
fn half_closed_client_gets_all_its_answers() {
    let mut site = Site::new();
    let mut client = site.ready();
    let commands = r#"{"execute": "echo"}"#.repeat(100);
    client.write_all(commands.as_bytes()).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(site.answer(&mut client).len(), 100);
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "it is disconnected");
}

#[test]
fn message_without_an_end_ends_the_connection() {
    let mut site = Site::new();
    let mut client = site.ready();
    let piece = "x".repeat(10_000);
    client.write_all(br#"{"execute": ""#).unwrap();
    while client.write_all(piece.as_bytes()).is_ok() {
        assert!(site.answer(&mut client).is_empty());
    }
    assert!(site.ready().write_all(b"{").is_ok());
}

#[test]
fn nesting_and_numbers_without_limit_are_errors() {
    let mut site = Site::new();
    let mut client = site.ready();
    let nested = "[".repeat(100_000);
    for text in [
        &*nested,
        "{\"id\": 1e999}",
        "-",
        "{\"execute\": \"\\ud800\"}",
    ] {
        let answers = site.ask(&mut client, &format!("{text}}} "));
        assert_eq!(answers[0]["error"]["class"], "GenericError", "{text}");
        site.answer(&mut client);
    }
    let answers = site.ask(&mut client, r#"{"execute": "echo"}"#);
    assert_eq!(answers, [json!({"return": {}})]);
}

#[test]
fn spaces_between_commands_do_not_add_up() {
    let mut site = Site::new();
    let mut client = site.ready();
    for _ in 0..100 {
        assert!(site.ask(&mut client, &" \n".repeat(5_000)).is_empty());
    }
    let answers = site.ask(&mut client, r#"{"execute": "echo"}"#);
    assert_eq!(answers, [json!({"return": {}})]);
}

#[test]
fn clients_that_say_nothing_keep_no_other_out() {
    let mut site = Site::new();
    let mut speaker = site.ready();
    let silent: Vec<_> = (0..200).map(|_| site.connect()).collect();
    let answers = site.ask(&mut speaker, r#"{"execute": "echo"}"#);
    assert_eq!(answers, [json!({"return": {}})]);
    site.ready();
    drop(silent);
}

#[test]
fn commands_of_clients_that_are_gone_are_bounded() {
    let mut site = Site::new();
    let hold = r#"{"execute": "hold"}"#;
    let refused = |site: &mut Site| !site.ready_and_ask(hold).is_empty();
    let count = (0..1000).take_while(|_| !refused(&mut site)).count();
    assert!((200..300).contains(&count), "{count}");
    // What does not wait is carried out as before once there is room.
    site.ready_and_ask(r#"{"execute": "release"}"#);
}

#[test]
fn last_event_reaches_a_client_that_is_far_behind() {
    let mut site = Site::new();
    let mut slow = site.ready();
    for _ in 0..10_000 {
        site.hub.publish(Event::Powerdown);
        while site.events.run_with_timeout(0).unwrap() > 0 {}
    }
    let end = Event::Shutdown {
        guest: true,
        reason: "guest-shutdown",
    };
    site.hub.publish(end);
    // It reads as fast as it can: the server waits for a moment only.
    let reader = std::thread::spawn(move || {
        slow.set_nonblocking(false).unwrap();
        let mut bytes = Vec::new();
        slow.read_to_end(&mut bytes).unwrap();
        bytes
    });
    drop(site);
    let bytes = reader.join().unwrap();
    let values = serde_json::Deserializer::from_slice(&bytes).into_iter::<Value>();
    let events: Vec<_> = values
        .map(|value| value.unwrap()["event"].clone())
        .collect();
    assert_eq!(
        (events.len(), &events[10_000]),
        (10_001, &json!("SHUTDOWN"))
    );
}
