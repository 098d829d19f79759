//! Several deliveries of one rule, made one request (pure).
//!
//! Its body is an array. Each item is what the delivery would have been by itself, an object, with its own `"webhook-id"` as the
//! first member; the `webhook-id` of the request stands for exactly these items. So a receiver that has seen half of a batch
//! in another one can tell.
//!
//! A batch takes in what goes to the same place with the same headers, from whatever database; it is sent as a whole, and what
//! becomes of it becomes of each item.

use super::Delivery;
use super::request::batch_id;
use crate::rules::handling::Batch;
use bytes::Bytes;
use std::borrow::Cow;
use std::sync::Arc;

/// What any receiver takes in one request; a larger item goes alone.
const BYTES_MAX: usize = 1024 * 1024;

#[derive(Clone)]
pub struct Gathered {
    pub batch: Batch,
    /// Of one document only the newest goes.
    latest_only: bool,
    /// In the order in which they came.
    items: Vec<Item>,
    bytes: usize,
}

#[derive(Clone)]
struct Item {
    id: String,
    order_key: u64,
    params: Bytes,
}

impl Gathered {
    pub fn of_one(batch: Batch, latest_only: bool, id: &str, order_key: u64, params: Bytes) -> Self {
        let item = Item { id: id.to_string(), order_key, params };
        Self { batch, latest_only, bytes: item.bytes(), items: vec![item] }
    }

    /// Neither takes in others nor joins them.
    pub fn go_alone(&mut self) {
        self.batch.max = 1;
    }

    /// A refusal of several says of none of them that it is to blame.
    pub fn is_of_several(&self) -> bool {
        self.items.len() > 1
    }

    pub fn is_full(&self) -> bool {
        self.items.len() >= self.batch.max || self.bytes >= BYTES_MAX
    }

    fn has_room_for(&self, newer: &Self) -> bool {
        self.items.len() + newer.items.len() <= self.batch.max.min(newer.batch.max) && self.bytes + newer.bytes <= BYTES_MAX
    }

    fn take_in(&mut self, newer: &Self) {
        if self.latest_only {
            self.items.retain(|item| newer.items.iter().all(|newer| newer.order_key != item.order_key));
        }
        self.items.extend_from_slice(&newer.items);
        self.bytes = self.items.iter().map(Item::bytes).sum();
    }

    fn id(&self) -> String {
        batch_id(self.items.iter().map(|item| item.id.as_str()))
    }

    fn body(&self) -> Bytes {
        let mut body = Vec::with_capacity(self.bytes + self.items.len() + 2);
        body.push(b'[');
        for (at, item) in self.items.iter().enumerate() {
            if at > 0 {
                body.push(b',');
            }
            item.push(&mut body);
        }
        body.push(b']');
        body.into()
    }
}

impl Item {
    fn bytes(&self) -> usize {
        self.params.len() + self.id.len() + 20
    }

    /// An id is of letters, digits, `-` and `_`.
    fn push(&self, body: &mut Vec<u8>) {
        body.extend_from_slice(b"{\"webhook-id\":\"");
        body.extend_from_slice(self.id.as_bytes());
        body.push(b'"');
        match self.params.strip_prefix(b"{") {
            Some(members) if members.first() != Some(&b'}') => {
                body.push(b',');
                body.extend_from_slice(members);
            }
            _ => body.push(b'}'),
        }
    }
}

/// As `Spec::fold` has it.
pub fn fold(this: &mut Arc<Delivery>, newer: Arc<Delivery>) -> Result<(), Arc<Delivery>> {
    match (&this.gathered, &newer.gathered) {
        (None, None) => {
            *this = newer;
            Ok(())
        }
        (Some(gathered), Some(more)) if gathered.has_room_for(more) => {
            if let Some(gathered) = &mut Arc::make_mut(this).gathered {
                gathered.take_in(more);
            }
            Ok(())
        }
        _ => Err(newer),
    }
}

/// The delivery as it is sent.
pub fn assembled(delivery: &Delivery) -> Cow<'_, Delivery> {
    let Some(gathered) = &delivery.gathered else { return Cow::Borrowed(delivery) };
    let mut one = Delivery { gathered: None, id: gathered.id(), ..delivery.clone() };
    one.request.body = Some(gathered.body());
    Cow::Owned(one)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::rules::template::Rendered;
    use crate::schedule::Spec;
    use crate::vault::Vault;
    use crate::webhook::request;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::time::Duration;

    const WITHIN: Duration = Duration::from_secs(2);

    fn delivery(number: usize, order_key: u64, params: &Value, latest_only: bool) -> Arc<Delivery> {
        let (batch, id) = (Batch { max: 3, within: WITHIN }, format!("msg_{number}"));
        let (method, url) = (reqwest::Method::POST, String::from("http://h/"));
        let rendered = Rendered { method, url, params: params.to_string() };
        let request = request::build(rendered, &Default::default(), &Vault::empty()).expect("a good request");
        let gathered = Gathered::of_one(batch, latest_only, &id, order_key, request.body.clone().expect("a body"));
        Arc::new(Delivery {
            id,
            rule_id: "rule".into(),
            db: "db".into(),
            request,
            order_key,
            coalesce_key: Some(1),
            gathered: Some(gathered),
        })
    }

    fn sent(delivery: &Delivery) -> (String, Value) {
        let sent = assembled(delivery);
        (sent.id.clone(), serde_json::from_slice(sent.request.body.as_ref().expect("a body")).expect("JSON"))
    }

    #[test]
    fn items_stand_in_an_array_each_with_its_own_id_first() {
        let mut batch = delivery(0, 0, &json!({"z": 1, "a": "x"}), false);
        for (number, params) in [json!({}), json!({"webhook-id": "forged"})].iter().enumerate() {
            assert!(!batch.is_full());
            assert!(fold(&mut batch, delivery(number + 1, 9, params, false)).is_ok());
        }
        assert!(batch.is_full() && batch.gathers() && batch.linger() == WITHIN);
        let body = assembled(&batch).request.body.clone().unwrap();
        let expected =
            r#"[{"webhook-id":"msg_0","z":1,"a":"x"},{"webhook-id":"msg_1"},{"webhook-id":"msg_2","webhook-id":"forged"}]"#;
        assert_eq!(std::str::from_utf8(&body).unwrap(), expected);
    }

    #[test]
    fn the_request_s_id_is_that_of_its_items() {
        let of = |numbers: &[usize]| {
            let mut batch = delivery(numbers[0], 0, &json!({}), false);
            for number in &numbers[1..] {
                assert!(fold(&mut batch, delivery(*number, *number as u64, &json!({}), false)).is_ok());
            }
            sent(&batch).0
        };
        // A receiver remembers ids over our upgrades: this one may never change.
        assert_eq!(of(&[1, 2]), batch_id(["msg_1", "msg_2"].into_iter()));
        let ids = [of(&[1]), of(&[2]), of(&[1, 2]), of(&[2, 1]), of(&[1, 2, 3]), String::from("msg_1")];
        assert!((0..ids.len()).all(|at| !ids[at + 1..].contains(&ids[at])), "{ids:?}");
    }

    #[test]
    fn what_is_not_to_be_gathered_stays_as_it_is() {
        let mut alone = (*delivery(1, 1, &json!({"a": 1}), false)).clone();
        alone.gathered = None;
        let mut alone = Arc::new(alone);
        assert_eq!(sent(&alone), (String::from("msg_1"), json!({"a": 1})));
        assert!(!alone.gathers() && !alone.is_full() && alone.linger().is_zero());
        let newer = Arc::new(Delivery { id: String::from("msg_2"), ..(*alone).clone() });
        assert!(fold(&mut alone, newer).is_ok());
        assert_eq!(alone.id, "msg_2", "the newest stands for both");
        assert!(fold(&mut alone, delivery(3, 3, &json!({}), false)).is_err());
    }

    #[test]
    fn one_that_is_too_large_for_a_batch_starts_its_own() {
        let large = json!({"a": "x".repeat(BYTES_MAX / 2)});
        let mut batch = delivery(0, 0, &large, false);
        assert!(fold(&mut batch, delivery(1, 1, &json!({}), false)).is_ok());
        assert!(fold(&mut batch, delivery(2, 2, &large, false)).is_err());
        assert!(!batch.is_full(), "a small one fits");
        assert!(delivery(3, 3, &json!({"a": "x".repeat(BYTES_MAX)}), false).is_full());
    }

    #[test]
    fn of_a_document_only_the_latest_goes_where_that_is_wanted() {
        for (latest_only, expected) in [(false, vec![1, 2, 3]), (true, vec![2, 3])] {
            let mut batch = delivery(1, 7, &json!({"n": 1}), latest_only);
            for (n, order_key) in [(2, 8), (3, 7)] {
                assert!(fold(&mut batch, delivery(n, order_key, &json!({"n": n}), latest_only)).is_ok());
            }
            let (_, body) = sent(&batch);
            let numbers: Vec<i64> = body.as_array().unwrap().iter().map(|item| item["n"].as_i64().unwrap()).collect();
            assert_eq!(numbers, expected);
        }
    }

    proptest! {
        #[test]
        fn whatever_the_items_say_the_body_is_the_array_of_them(texts in prop::collection::vec("(?s).{0,20}", 1..4)) {
            let params = |text: &String| json!({text.clone(): text, "b": [text, {"c": null}]});
            let mut batch = delivery(0, 0, &params(&texts[0]), false);
            for (number, text) in texts.iter().enumerate().skip(1) {
                prop_assert!(fold(&mut batch, delivery(number, number as u64, &params(text), false)).is_ok());
            }
            let expected: Vec<Value> = texts.iter().enumerate().map(|(number, text)| {
                let mut item = params(text);
                item["webhook-id"] = json!(format!("msg_{number}"));
                item
            }).collect();
            prop_assert_eq!(sent(&batch).1, Value::from(expected));
        }
    }
}
