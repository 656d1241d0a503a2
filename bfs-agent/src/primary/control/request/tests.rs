//! Requests: what is read, what is refused, and what the documentation says.

use super::*;
use proptest::prelude::*;

fn refused(line: &str) -> (String, String) {
    let bad = Request::parse(line.as_bytes()).unwrap_err();
    (bad.field.unwrap_or_default(), bad.message)
}

#[test]
fn what_is_left_out_has_its_usual_value() {
    let ask = |line: &str| Request::parse(line.as_bytes()).unwrap();
    assert_eq!(ask(r#"{"request":"status"}"#), Request::Status);
    assert_eq!(
        ask(" {\"request\": \"checkpoint\"}\r"),
        Request::Checkpoint { tag: String::new(), wait: WaitFor::Confirmed, timeout_ms: 60_000 }
    );
    assert_eq!(
        ask(r#"{"offset":4096,"request":"report_update","path":"/srv/ä"}"#),
        Request::ReportUpdate {
            path: "/srv/ä".into(), offset: Some(4096), length: None, timeout_ms: 60_000
        }
    );
}

#[test]
fn a_checkpoint_is_a_number_or_a_text() {
    for at in ["7", "\"7\""] {
        let line = format!(r#"{{"request":"recover","path":"/x","at":{at}}}"#);
        let Ok(Request::Recover { at, .. }) = Request::parse(line.as_bytes()) else { panic!("{line}") };
        assert_eq!(at.as_deref(), Some("7"));
    }
}

#[test]
fn what_is_written_is_read() {
    let (path, timeout_ms, address) = (PathBuf::from("/a"), 5, String::from("dir:/a"));
    let settings = PolicySettings {
        backup: Some("close".into()),
        recovery: Some("manual".into()),
        retries: Some(7),
        time_limit_ms: Some(9),
        place: Some("x/y".into()),
    };
    let all = [
        Request::Status,
        Request::Checkpoint { tag: "t".into(), wait: WaitFor::Taken, timeout_ms },
        Request::CheckpointStopped { tag: "t".into(), wait: WaitFor::Applied, timeout_ms, limit_ms: 7 },
        Request::ReportUpdate { path: path.clone(), offset: Some(1), length: Some(2), timeout_ms },
        Request::ReportUpdate { path: path.clone(), offset: None, length: None, timeout_ms },
        Request::Recover { path: path.clone(), at: None, timeout_ms },
        Request::Recover { path: path.clone(), at: Some("tag:x".into()), timeout_ms },
        Request::Recover { path: path.clone(), at: Some(NEWEST.into()), timeout_ms },
        Request::GoBack { at: None, timeout_ms },
        Request::GoBack { at: Some("7".into()), timeout_ms },
        Request::Flush { timeout_ms },
        Request::Verify { timeout_ms, repair: true },
        Request::PathAdd { path: path.clone(), timeout_ms },
        Request::PathRemove { path, timeout_ms },
        Request::DestAdd { address: address.clone() },
        Request::DestRemove { address: address.clone() },
        Request::DestPause { address: address.clone() },
        Request::DestResume { address: address.clone() },
        Request::DestResync { address },
        Request::PolicyList,
        Request::PolicyAdd { pattern: "/a".into(), settings: PolicySettings::default(), timeout_ms },
        Request::PolicySet { pattern: "*.b".into(), settings, timeout_ms },
        Request::PolicySuspend { pattern: "/a".into(), timeout_ms },
        Request::PolicyResume { pattern: "/a".into(), timeout_ms },
        Request::PolicyDelete { pattern: "/a".into(), timeout_ms },
        Request::Switchover { timeout_ms, signal: false, kill: true },
        Request::Stop { timeout_ms },
    ];
    let mut names = std::collections::BTreeSet::new();
    for request in all {
        let line = serde_json::to_vec(&request).unwrap();
        assert_eq!(Request::parse(&line), Ok(request));
        let value: Value = serde_json::from_slice(&line).unwrap();
        names.insert(value["request"].as_str().unwrap().to_owned());
    }
    assert_eq!(names, KNOWN.iter().map(|name| (*name).to_owned()).collect());
}

#[test]
fn the_documentation_has_every_request_and_field() {
    let text = include_str!("../../../../../docs/interface.md");
    for name in KNOWN {
        assert!(text.contains(&format!("`{name}`")), "{name}");
        let what = match name.split('_').next() {
            Some("policy") => r#""pattern":"/a""#,
            Some("dest") => r#""address":"dir:/a""#,
            _ => r#""path":"/a""#,
        };
        let line = format!(r#"{{"request":"{name}",{what},"no such":1}}"#);
        let hint = Request::parse(line.as_bytes()).unwrap_err().hint;
        for field in hint.trim_start_matches("it has ").split(", ") {
            assert!(text.contains(&format!("`{field}`")), "{name}: {field}");
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (line, field, why) in [
        ("", "", "empty"),
        ("status", "", "not a request: expected value"),
        ("[]", "", "expected an object"),
        ("{}", "request", "missing"),
        (r#"{"request":7}"#, "request", "invalid type"),
        (r#"{"request":"checkpont"}"#, "request", "did you mean \"checkpoint\""),
        (r#"{"request":"policy_suspend"}"#, "pattern", "missing"),
        (r#"{"request":"dest_add"}"#, "address", "missing"),
        (r#"{"request":"dest_add","address":"/store"}"#, "address", "tcp://"),
        (r#"{"request":"policy_delete","pattern":"a/b"}"#, "pattern", "neither absolute nor a name"),
        (r#"{"request":"policy_add","pattern":"/a","backup":"x"}"#, "backup", "no class"),
        (r#"{"request":"policy_set","pattern":"/a","place":"/x"}"#, "place", "no plain relative path"),
        (r#"{"request":"policy_set","pattern":"/a","suspended":true}"#, "suspended", "no such field"),
        (r#"{"request":"recover","path":"/x","at":"yesterday"}"#, "at", "write a number"),
        (r#"{"request":"go_back","at":"newest"}"#, "at", "write a number"),
        (r#"{"request":"recover","path":"/x","at":-3}"#, "at", "write a number"),
        (r#"{"request":"status","x":1}"#, "x", "no such field in status"),
        (r#"{"request":"checkpoint","wiat":"sealed"}"#, "wiat", "did you mean \"wait\""),
        (r#"{"request":"checkpoint","wait":"done"}"#, "wait", "unknown variant `done`"),
        (r#"{"request":"checkpoint","tag":"a","tag":"b"}"#, "tag", "twice"),
        (r#"{"request":"checkpoint","tag":"a\nb"}"#, "tag", "control"),
        (r#"{"request":"checkpoint","timeout_ms":-1}"#, "timeout_ms", "-1"),
        (r#"{"request":"checkpoint","timeout_ms":1.5}"#, "timeout_ms", "1.5"),
        (r#"{"request":"verify","repair":1}"#, "repair", "invalid type"),
        (r#"{"request":"checkpoint","timeout_ms":99999999999999}"#, "timeout_ms", "year"),
        (r#"{"request":"report_update"}"#, "path", "missing"),
        (r#"{"request":"report_update","path":"a"}"#, "path", "not absolute"),
        (r#"{"request":"report_update","path":"/a\u0000"}"#, "path", "zero"),
        (r#"{"request":"report_update","path":"/a","length":0}"#, "length", "0"),
        (r#"{"request":"report_update","path":"/a","offset":9223372036854775808}"#, "offset", "beyond"),
        (
            r#"{"request":"report_update","path":"/a","offset":9,"length":18446744073709551615}"#,
            "length",
            "beyond",
        ),
        (r#"{"request":"status"} {}"#, "", "trailing"),
    ] {
        let (at, message) = refused(line);
        assert!(at == field && message.contains(why), "{line}: {at:?}: {message}");
    }
    let long = format!(r#"{{"request":"checkpoint","tag":"{}"}}"#, "x".repeat(256));
    assert_eq!(refused(&long).0, "tag");
    let bad = Request::parse(b"{\"request\":\"st\xff\"}").unwrap_err();
    assert_eq!(bad.message, "byte 15 of the line is not UTF-8");
    assert!(Request::parse(br#"{"request":"promote"}"#).unwrap_err().is_unknown);
}

proptest! {
    #[test]
    fn any_line_is_answered(line in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Request::parse(&line);
    }
}
