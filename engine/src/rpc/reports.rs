//! What the other hosts say of themselves, asked when somebody wants to know.

use std::time::Duration;

use fleece_schema::peer_capnp::peer;
use futures::StreamExt;
use tokio::time::timeout;

use super::blocking::blocking;
use super::links::with_host;
use super::peers::{LINKS, Peers};
use crate::error::{Error, Kind, Result};
use crate::hosts::{self, HostReport, SessionReport};
use crate::ids::HostId;

/// How long a host may take to say how it is: its owner may be in the middle of a pass.
const REPORT: Duration = Duration::from_secs(5);

impl Peers {
    /// How it is with all hosts, this one first; one that does not answer in time is silent, if it is not a
    /// revoked one.
    ///
    /// # Errors
    /// When the engine is ending.
    pub(super) async fn reports(&self) -> capnp::Result<Vec<HostReport>> {
        let context = self.context.clone();
        let own = blocking(move || hosts::own(&context)).await?;
        let asked = self.ask_others(async |client| {
            let answer = client.describe_request().send().promise.await?;
            of_json(answer.get()?.get_report()?)
        });
        let others = asked.await.into_iter().map(|(known, report)| match report {
            // What it says of itself but what we know of the map.
            Ok(report) => HostReport { state: "answers".into(), ..report },
            Err(error) if error.kind() == Kind::NotPermitted => {
                HostReport { state: HostReport::REVOKED.into(), ..known }
            }
            Err(_) => known,
        });
        Ok(std::iter::once(own).chain(others).collect())
    }

    /// The backups that run on the other hosts, by the hosts' names; none of one that does not answer.
    pub(super) async fn sessions(&self) -> Vec<(String, Option<Vec<SessionReport>>)> {
        let asked = self.ask_others(async |client| {
            let answer = client.sessions_request().send().promise.await?;
            of_json(answer.get()?.get_sessions()?)
        });
        asked.await.into_iter().map(|(known, running)| (known.name, running.ok())).collect()
    }

    /// Asks all other hosts, each with what is known of it; [`Kind::NotPermitted`] is of one that is revoked.
    async fn ask_others<T>(
        &self,
        ask: impl AsyncFn(peer::Client) -> capnp::Result<T>,
    ) -> Vec<(HostReport, Result<T>)> {
        // One after the other: each of them takes links of its own.
        let Ok(_one) = self.asking.acquire().await else { return Vec::new() };
        let asked = hosts::known(&self.context).into_iter().skip(1).map(|known| async {
            let host = HostId(known.number);
            if !self.cluster.is_sure() {
                // They would take it for the host that it may not be.
                let why = "this engine is not found at its own address in cluster.static";
                return (known, Err(Error::new(Kind::Failed, why)));
            }
            let link = (host, self.cluster.instance(host));
            let answer = with_host(self, link, async |client, _, _| {
                // Whatever a host says of itself, whether it is revoked is not its to say.
                ask(client).await.map_err(|error| Error::caused(Kind::Failed, "no report", error))
            });
            let late = |_| Err(Error::new(Kind::Failed, "no answer"));
            (known, timeout(REPORT, answer).await.unwrap_or_else(late))
        });
        futures::stream::iter(asked).buffered(LINKS).collect().await
    }
}

pub(super) fn to_json(value: &impl serde::Serialize) -> capnp::Result<String> {
    serde_json::to_string(value).map_err(|error| capnp::Error::failed(error.to_string()))
}

fn of_json<T: serde::de::DeserializeOwned>(text: capnp::text::Reader<'_>) -> capnp::Result<T> {
    serde_json::from_slice(text.as_bytes()).map_err(|error| capnp::Error::failed(error.to_string()))
}
