//! What QEMU can do, by its schema (`query-qmp-schema`).
//!
//! That has some 250 KiB, of which `qapi` would make a tree of 6 MiB: more than all else of a small
//! backup. So only what is looked for in it is handed on to `qapi`.

use crate::qmp::command as cmd;
use crate::qmp::session::Version;
use crate::qmp::wire::says;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A driver: the disk at the point in time, as a node.
const VIEW: &str = "snapshot-access";
/// A driver, and options of it that spare the guest where the backup fails.
const FILTER: [&str; 3] = ["copy-before-write", "on-cbw-error", "cbw-timeout"];
/// The debugging command only helps to see filters; without it the top node is the disk.
const OPTIONAL: &str = "x-debug-query-block-graph";

/// One type, command or event.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SchemaItem {
    /// A number for types, the word itself for commands.
    pub name: String,
    /// command, object, enum, …
    pub meta_type: String,
    /// Of an object, an alternate or an enum.
    #[serde(default)]
    pub members: Vec<SchemaMember>,
    /// Of an enum: its values.
    #[serde(default)]
    pub values: Vec<String>,
}

/// A member of a type.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SchemaMember {
    /// Its word; those of an alternate have none.
    #[serde(default)]
    pub name: String,
}

/// What a QEMU can do beyond the least that we require.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// An explicit copy-before-write filter that breaks the snapshot and not the guest.
    pub filter: bool,
    /// NBD clients of a disk with an iothread do not end QEMU (10.0; 7.2 aborts). What it does
    /// not bear instead: see `point::choose`.
    pub iothread_safe: bool,
}

impl Features {
    /// Out of a schema, whole or as [`looked_for`] leaves it.
    ///
    /// # Errors
    /// What is missing of that which every backup needs, in words.
    pub(super) fn of(schema: &[SchemaItem], version: Version) -> Result<Features, String> {
        let command = |word: &str| schema.iter().any(|i| i.is_command() && i.name == word);
        // A value of an enum is its member, too, and nothing else where `values` has gone.
        let word = |word: &str| {
            schema.iter().any(|item| {
                item.values.iter().any(|value| value == word)
                    || item.members.iter().any(|member| member.name == word)
            })
        };
        let missing = cmd::ALL.iter().find(|word| **word != OPTIONAL && !command(word));
        if let Some(missing) = missing {
            return Err((*missing).to_owned());
        }
        if !word(VIEW) {
            return Err(format!("the driver {VIEW}"));
        }
        let filter = FILTER.into_iter().all(word);
        Ok(Features { filter, iothread_safe: version.major >= 10 })
    }
}

impl SchemaItem {
    fn is_command(&self) -> bool {
        self.meta_type == "command"
    }

    /// Takes out what is not looked for; false if nothing is left.
    fn keep_what_is_looked_for(&mut self) -> bool {
        let word = |word: &str| word == VIEW || FILTER.contains(&word);
        self.members.retain(|member| word(&member.name));
        self.values.retain(|value| word(value));
        let command = self.is_command() && cmd::ALL.contains(&self.name.as_str());
        command || !self.members.is_empty() || !self.values.is_empty()
    }
}

#[derive(Serialize, Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    items: Vec<SchemaItem>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
}

/// The answer that carries a schema, without what nobody looks for; `None` for any other line.
pub(super) fn looked_for(line: &[u8]) -> Option<Vec<u8>> {
    if !says(line, b"\"meta-type\"") {
        return None;
    }
    let mut answer: Answer = serde_json::from_slice(line).ok()?;
    answer.items.retain_mut(SchemaItem::keep_what_is_looked_for);
    let mut line = serde_json::to_vec(&answer).ok()?;
    line.push(b'\n');
    Some(line)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn whole() -> Vec<Value> {
        let commands = cmd::ALL.iter().map(
            |word| json!({"name": word, "meta-type": "command", "arg-type": "0", "ret-type": "1"}),
        );
        let mut items: Vec<Value> = commands.collect();
        items.extend([
            json!({"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "1"}),
            json!({"name": "0", "meta-type": "object", "members": []}),
            json!({"name": "1", "meta-type": "enum", "values": ["raw", "copy-before-write", VIEW],
                "members": [{"name": "raw"}, {"name": "copy-before-write"}, {"name": VIEW}]}),
            json!({"name": "2", "meta-type": "object", "members": [
                {"name": "on-cbw-error", "default": null, "type": "3"},
                {"name": "cbw-timeout", "default": null, "type": "int"}, {"name": "file", "type": "4"}]}),
            json!({"name": "3", "meta-type": "alternate", "members": [{"type": "int"}]}),
            json!({"name": "int", "meta-type": "builtin", "json-type": "int"}),
        ]);
        items
    }

    const VERSION: Version = Version { major: 7, minor: 2, micro: 0 };

    fn features(items: &[Value]) -> Result<bool, String> {
        let line = json!({"id": 7, "return": items}).to_string();
        let less: Value = serde_json::from_slice(&looked_for(line.as_bytes()).unwrap()).unwrap();
        assert_eq!(less["id"], 7);
        let less: Vec<SchemaItem> = serde_json::from_value(less["return"].clone()).unwrap();
        let all: Vec<SchemaItem> = serde_json::from_value(json!(items)).unwrap();
        assert_eq!(Features::of(&less, VERSION), Features::of(&all, VERSION));
        assert!(less.len() <= cmd::ALL.len() + 2 && !less.iter().any(|i| i.name == "quit"));
        Features::of(&less, VERSION).map(|features| features.filter)
    }

    #[test]
    fn less_of_a_schema_says_the_same() {
        let items = whole();
        assert_eq!(features(&items), Ok(true));
        let without = |word: &str| {
            let mut items = items.clone();
            for item in &mut items {
                for list in ["members", "values"] {
                    if let Some(list) = item.get_mut(list).and_then(Value::as_array_mut) {
                        list.retain(|v| *v != word && v["name"] != word);
                    }
                }
            }
            items.retain(|item| item["name"] != word);
            features(&items)
        };
        for word in FILTER {
            assert_eq!(without(word), Ok(false));
        }
        assert_eq!(without(OPTIONAL), Ok(true));
        assert_eq!(without(VIEW), Err("the driver snapshot-access".into()));
        assert_eq!(without("blockdev-add"), Err("blockdev-add".into()));
    }

    #[test]
    fn other_answers_are_no_schema() {
        for other in [
            json!({"return": {}}),
            json!({"return": [{"node-name": "d0", "drv": "raw"}]}),
            json!({"return": [{"name": "d0"}]}),
            json!({"return": [{"meta-type": "command"}]}),
            json!({"return": []}),
            json!({"error": {"class": "GenericError", "desc": "no"}}),
        ] {
            assert_eq!(looked_for(other.to_string().as_bytes()), None, "{other}");
        }
    }
}
