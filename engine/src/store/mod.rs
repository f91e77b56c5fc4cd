//! What is durable: objects, containers, recipes, manifests, journals, keys. Knows nothing of detection.

pub mod manifest;
pub mod recipe;
