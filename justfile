# `just --list` shows what there is. Everything here is also a plain command; .ci/run is what CI runs.

set positional-arguments

# What CI runs: format, lints, tests, documentation, licences.
check: fmt lint test doc deny

fmt:
    cargo fmt --all --check

lint:
    cargo clippy --all-targets --locked -- -D warnings
    cargo clippy --all-targets --locked --no-default-features -- -D warnings

# Against the embedded server, PouchDB where npm is, and SPIEGEL_TEST_COUCHDB_URL where it is set.
test *arguments:
    cargo test --locked "$@"

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked --document-private-items

# Not the advisories: their database needs the network. `cargo deny check advisories` asks for them.
deny:
    cargo deny --locked check bans licenses sources

# The budgets of the design, against a CouchDB of your own: `just bench --url http://admin:secret@127.0.0.1:5984`
bench *arguments:
    cargo build --release --locked
    cargo bench --locked --bench spiegel -- "$@"

# Shows in a minute what Spiegel does, with nothing installed.
demo:
    cargo run --locked -- demo
