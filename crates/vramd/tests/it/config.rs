//! Which source of a setting wins, and that `config show` says so.

use serde_json::{Value, json};

use crate::support::{Ended, Home};

fn write(home: &Home, name: &str, text: &str) -> String {
    let path = home.path(name);
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    std::fs::write(&path, text).expect("a file");
    path.to_str().expect("UTF-8").to_owned()
}

fn setting<'a>(shown: &'a Value, key: &str) -> (&'a Value, &'a str) {
    let settings = shown["settings"].as_array().expect("settings");
    let found = settings.iter().find(|setting| setting["key"] == key).expect("the key");
    (&found["value"], found["origin"].as_str().expect("an origin"))
}

#[test]
fn without_anything_every_value_is_the_default() {
    let home = Home::new();
    let shown = home.run(&["config", "show", "--json"]).expect(0).json();
    for entry in shown["settings"].as_array().expect("settings") {
        assert_eq!(entry["origin"], "default", "{entry}");
    }
    assert_eq!(setting(&shown, "listen").0, "127.0.0.1:8726");
    assert_eq!(setting(&shown, "log").0, "info");
    assert_eq!(setting(&shown, "cpu_limit").0, &Value::Null);
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let home = Home::new();
    let file = write(
        &home,
        "config/vramd/vramd.toml",
        "listen = \"none\"\nsim = \"8GiB\"\nlog = \"debug\"\ncpu_limit = 4096\nmodel_roots = [\"/a\", \"/b\"]\n",
    );
    let ended: Ended = home
        .command(&["config", "show", "--json", "--sim", "2GiB", "--model-root", "/d", "--model-root", "/e"])
        .env("VRAMD_SIM", "4GiB")
        .env("VRAMD_LOG", "warn")
        .env("VRAMD_MODEL_ROOT", "/c")
        .env("VRAMD_STATE_DIR", "")
        .output()
        .expect("runs")
        .into();
    let shown = ended.expect(0).json();
    assert_eq!(setting(&shown, "sim"), (&json!("2GiB"), "flag --sim"));
    assert_eq!(setting(&shown, "model_roots"), (&json!(["/d", "/e"]), "flag --model-root"));
    assert_eq!(setting(&shown, "log"), (&json!("warn"), "environment VRAMD_LOG"));
    assert_eq!(setting(&shown, "listen"), (&json!("none"), format!("file {file}").as_str()));
    assert_eq!(setting(&shown, "cpu_limit").0, 4096);
    assert_eq!(setting(&shown, "state_dir").1, "default");
}

#[test]
fn roots_in_the_environment_are_separated_by_colons() {
    let home = Home::new();
    let ended: Ended =
        home.command(&["config", "show"]).env("VRAMD_MODEL_ROOT", "/a::/b").output().expect("runs").into();
    assert!(ended.expect(0).stdout.contains("/a:/b   "));
}

#[test]
fn a_named_file_replaces_the_search_and_must_be_there() {
    let home = Home::new();
    write(&home, "config/vramd/vramd.toml", "sim = \"8GiB\"\n");
    let file = write(&home, "other.toml", "cpu_limit = \"1.5GiB\"\n");
    let shown = home.run(&["config", "show", "--json", "--config", &file]).expect(0).json();
    assert_eq!(setting(&shown, "sim").1, "default");
    assert_eq!(setting(&shown, "cpu_limit"), (&json!(3u64 << 29), format!("file {file}").as_str()));

    let ended: Ended =
        home.command(&["config", "show"]).env("VRAMD_CONFIG", "missing.toml").output().expect("runs").into();
    let ended = ended.expect(2);
    assert!(ended.stderr.contains("cannot read missing.toml: No such file"), "{ended:?}");
    assert!(ended.stderr.contains("hint: "), "{ended:?}");
}

#[test]
fn what_is_wrong_in_a_file_is_shown_with_its_line() {
    let home = Home::new();
    for (text, complaints) in [
        ("log = \"info\"\nlimit = 5\n", &["unknown field `limit`", "line 2", "hint: "][..]),
        ("cpu_limit = \"much\"\n", &["line 1", "is not a size"]),
        ("cpu_limit = true\n", &["line 1", "a size such as \"24GiB\""]),
        ("listen = \"localhost:80\"\n", &["line 1", "an address and a port"]),
        ("quiet_hours = \"22:00-24:00\"\n", &["line 1", "write midnight as 00:00"]),
        ("listen = [\n", &["line 1"]),
        ("state_dir = \"state\"\n", &["state_dir has the relative path state", "from the root"]),
        ("model_roots = [\"models\"]\n", &["model_roots has the relative path models"]),
    ] {
        let file = write(&home, "vramd.toml", text);
        let ended = home.run(&["config", "show", "--config", &file]).expect(2);
        for complaint in complaints.iter().chain(&[file.as_str()]) {
            assert!(ended.stderr.contains(complaint), "{text:?} said {}", ended.stderr);
        }
    }
}

#[test]
fn what_is_wrong_in_the_environment_is_named() {
    let home = Home::new();
    let ended: Ended = home.command(&["serve"]).env("VRAMD_CPU_LIMIT", "much").output().expect("runs").into();
    let ended = ended.expect(2);
    assert!(ended.stderr.contains("VRAMD_CPU_LIMIT has the value \"much\""), "{ended:?}");
}

#[test]
fn quiet_hours_are_shown_as_they_are_kept_and_others_are_refused() {
    let home = Home::new();
    let show = ["config", "show", "--json"];
    assert_eq!(setting(&home.run(&show).expect(0).json(), "quiet_hours"), (&json!("none"), "default"));
    let run = |arguments: &[&str], variable: &str| -> Ended {
        home.command(arguments).env("VRAMD_QUIET_HOURS", variable).output().expect("runs").into()
    };
    let shown = run(&show, "22:00-06:00, 12:00-13:00").expect(0).json();
    let value = json!("22:00-06:00,12:00-13:00");
    assert_eq!(setting(&shown, "quiet_hours"), (&value, "environment VRAMD_QUIET_HOURS"));
    let shown = run(&[&show[..], &["--quiet-hours", "none"]].concat(), "22:00-06:00").expect(0).json();
    assert_eq!(setting(&shown, "quiet_hours"), (&json!("none"), "flag --quiet-hours"));

    let ended = run(&["serve"], "02:00-02:00").expect(2);
    assert!(ended.stderr.contains("VRAMD_QUIET_HOURS has the value \"02:00-02:00\""), "{ended:?}");
    let ended = home.run(&["serve", "--quiet-hours", "at night"]).expect(2);
    assert!(ended.stderr.contains("write hours such as 02:00-05:00"), "{ended:?}");
}
