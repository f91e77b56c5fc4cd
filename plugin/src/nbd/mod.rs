//! NBD: the wire, our client, our server.
