//! Requests that failed in a way that `object_store` does not know are tried again as well.
//!
//! A connection that was kept may end after it was chosen and before the request had its turn. hyper
//! calls that "canceled: connection was not ready"; `object_store` takes it for unknown, and gives up.

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

/// Connects as `object_store` does by itself.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Resend(ReqwestConnector::default().connect(options)?)))
    }
}

#[derive(Debug)]
struct Resend(HttpClient);

#[async_trait]
impl HttpService for Resend {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.0.execute(request).await.map_err(as_not_sent)
    }
}

/// Each of our requests may be sent twice: an object is made only where none is, and whether it was
/// we who made it is settled by reading it ([`super::Objects::create`]).
fn as_not_sent(error: HttpError) -> HttpError {
    match error.kind() {
        HttpErrorKind::Unknown => HttpError::new(HttpErrorKind::Request, error),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_tried_again_and_the_rest_as_before() {
        let error = |kind| HttpError::new(kind, std::io::Error::other("not ready"));
        let unknown = as_not_sent(error(HttpErrorKind::Unknown));
        assert_eq!(unknown.kind(), HttpErrorKind::Request);
        assert!(format!("{unknown:?}").contains("not ready"));
        assert_eq!(as_not_sent(error(HttpErrorKind::Decode)).kind(), HttpErrorKind::Decode);
        assert_eq!(as_not_sent(error(HttpErrorKind::Timeout)).kind(), HttpErrorKind::Timeout);
    }
}
