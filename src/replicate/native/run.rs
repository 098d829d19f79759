//! One run: everything that the source has when it begins is in the target when it ends.
//!
//! It reads both checkpoints beside the first page of changes. Where they are those that were confirmed last, the page is
//! used; else the histories say where to begin, and a checkpoint is set there before the first document, so that a target
//! that is made again meanwhile is noticed. Pages overlap; the position moves over them in their order.

use super::behind::{Behind, Checked};
use super::checkpoint::{Checkpoint, common_ancestor};
use super::documents::{Transfer, TransferError};
use super::overlap::{Found, Overlap};
use super::parameters::{Parameters, Selection};
use super::peer::{ChangesRequest, ChangesRow, Page, Peer};
use super::slots::{Anchor, Position, Slot, SourceBehind, Unsaved};
use super::standing::{AtSource, News, stands};
use super::written::Written;
use crate::couch::Seq;
use crate::replicate::{Counts, Progress};
use futures_util::future::{BoxFuture, Fuse, FusedFuture, FutureExt};
use futures_util::stream::{FuturesOrdered, StreamExt};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Rows of a page, unless the replicator says otherwise.
const PAGE_ROWS: usize = 1_000;
/// After so long a run gives way to others, at the end of a page.
const TURN: Duration = Duration::from_secs(10);
/// Of a page that brings its documents along.
const NEWS_ROWS: usize = 25;
/// Pages whose documents are on their way at once.
const PAGES: usize = 3;

pub struct Run<'a> {
    pub id: Arc<str>,
    pub replicator_id: Arc<str>,
    pub behind: &'a Behind,
    pub transfer: Transfer,
    pub parameters: Parameters,
    /// Another replicator goes the other way: the target may well have what is new here.
    pub is_bidirectional: bool,
    pub progress: Arc<Progress>,
}

#[derive(Debug, Default)]
pub struct Done {
    pub counts: Counts,
    pub rows: u64,
    /// There is more than one turn could bring.
    pub is_unfinished: bool,
}

type Result<T> = std::result::Result<T, TransferError>;
/// A page whose documents are in the target, and what that took.
type Through = (Arc<Page>, Counts);

struct Begin {
    page: Arc<Page>,
    since: Seq,
    /// None where no checkpoints are kept.
    anchor: Option<Anchor>,
    source_behind: SourceBehind,
    overlap: Option<Arc<Overlap>>,
    /// The position was confirmed: what comes after it is new to the target.
    is_known: bool,
}

/// What comes after a known position.
struct Ahead {
    position: Position,
    news: News,
    page: Result<Arc<Page>>,
}

impl Run<'_> {
    pub async fn run(&self) -> Result<Done> {
        if matches!(&self.parameters.selection, Selection::DocIds(ids) if ids.is_empty()) {
            return Ok(Done::default());
        }
        let mut slot = self.behind.slots.hold(&self.id).await;
        let begin = self.begin(&mut slot).await?;
        let start = begin.since.clone();
        let is_news = begin.is_known && !self.is_bidirectional;
        let mut done = Done::default();
        let result = self.pages(begin, is_news, &mut slot, &mut done).await;
        if done.rows == 0 && result.is_ok() {
            tracing::trace!(id = %self.id, ?start, "no changes");
        }
        result.map(|()| done)
    }

    async fn pages(&self, begin: Begin, is_news: bool, slot: &mut Slot, done: &mut Done) -> Result<()> {
        let Begin { page, since: start, mut anchor, mut source_behind, mut overlap, .. } = begin;
        let begun = Instant::now();
        let has_new_documents = page.rows.iter().filter(|row| is_first(row)).count() * 2 >= page.rows.len();
        let epoch = self.behind.slots.epoch();
        // What is written while we read is the next run's: a source that never rests must not keep this one.
        let mut left = page.pending.map(|pending| pending.saturating_add(page.rows.len() as u64));
        let total = left;
        let mut working: FuturesOrdered<BoxFuture<'_, Result<Through>>> = FuturesOrdered::new();
        let mut reading: Fuse<BoxFuture<'_, Result<Arc<Page>>>> = Fuse::terminated();
        let mut arrived = Some(page);
        let mut started = SystemTime::now();
        let (mut from, mut first) = (start.clone(), Some(start));
        loop {
            if let Some(page) = arrived.take() {
                let rows = page.rows.len() as u64;
                left = left.map(|left| left.saturating_sub(rows));
                let is_last = rows == 0
                    || left == Some(0)
                    || page.pending == Some(0)
                    || (page.pending.is_none() && rows < self.limit().min(NEWS_ROWS) as u64);
                // Without a checkpoint the next turn would begin where this one did.
                if !is_last && anchor.is_some() && begun.elapsed() > TURN {
                    done.is_unfinished = true;
                } else if !is_last {
                    let next = self.transfer.shared.changes(&self.transfer.source, self.changes(Some(page.last_seq.clone())));
                    reading = async { next.await.map_err(TransferError::from) }.boxed().fuse();
                }
                working.push_back(self.page(page, is_news).boxed());
            }
            tokio::select! {
                page = &mut reading, if !reading.is_terminated() && working.len() < PAGES => arrived = Some(page?),
                Some(finished) = working.next() => {
                    let (page, counts) = finished?;
                    let refused = self.transfer.take_refused(&page);
                    let (last_seq, rows) = (page.last_seq.clone(), page.rows.len() as u64);
                    done.counts += counts;
                    done.rows += rows;
                    let pending = total.map(|total| total.saturating_sub(done.rows));
                    self.progress.so_far(super::report(done, &self.transfer), pending, last_seq.number());
                    let Some(at) = &anchor else { continue };
                    if rows > 0 {
                        overlap = first.take().and_then(|since| self.overlap(&page, &since));
                        source_behind = source_behind.and(rows);
                    }
                    if rows > 0 && overlap.is_none() {
                        source_behind = source_behind.due();
                    }
                    let (since, anchor_now, overlap) = (last_seq, at.clone(), overlap.clone());
                    slot.position = Some(Position { since, anchor: anchor_now, source_behind, has_new_documents, overlap, epoch });
                    if rows == 0 {
                        continue;
                    }
                    let unsaved = slot.unsaved.get_or_insert_with(|| Box::new(self.unsaved(from.clone(), started)));
                    unsaved.counts += counts;
                    unsaved.written.add(page.rows.iter().filter(|row| !refused.contains(&row.id)));
                    self.behind.slots.mark_unsaved(&self.id, unsaved.since);
                    if (unsaved.since.elapsed() >= self.behind.after || self.behind.remembered.is_crowded())
                        && let Some(position) = slot.position.clone()
                    {
                        // In the middle of a long run, which holds its slot all the time.
                        if self.behind.save(&self.id, slot).await? == Checked::Moved {
                            return Err(self.moved());
                        }
                        (from, started) = (position.since, SystemTime::now());
                        if let Some(saved) = &slot.position {
                            (anchor, source_behind) = (Some(saved.anchor.clone()), saved.source_behind);
                        }
                    }
                }
                else => return Ok(()),
            }
        }
    }

    /// Somebody took a side away under the run: what it wrote before may be gone.
    fn moved(&self) -> TransferError {
        let reason = String::from("source or target was replaced while it was replicated");
        TransferError::Document { which: "checkpoint", id: self.id.to_string(), reason }
    }

    async fn page(&self, page: Arc<Page>, is_news: bool) -> Result<Through> {
        let counts = match page.rows.is_empty() {
            true => Counts::default(),
            false => self.transfer.page(&page, is_news).await?,
        };
        Ok((page, counts))
    }

    async fn begin(&self, slot: &mut Slot) -> Result<Begin> {
        let (source, target) = (&self.transfer.source, &self.transfer.target);
        if !self.parameters.use_checkpoints {
            let since = self.first();
            if self.parameters.create_target {
                target.create(&self.parameters.create_target_params).await?;
            }
            let page = self.read(since.clone()).await?;
            let source_behind = SourceBehind::unknown();
            return Ok(Begin { page, since, anchor: None, source_behind, overlap: None, is_known: false });
        }
        let known = slot.position.clone().filter(|position| position.epoch == self.behind.slots.epoch());
        let ahead = async {
            match &known {
                Some(position) => Some(self.read_news(position).await),
                None => None,
            }
        };
        // Most of a source that went back is seen by what it lacks, and all of it before its next checkpoint.
        let skips_source = known.as_ref().is_some_and(|position| position.overlap.is_some());
        let at_source = async {
            match skips_source {
                true => None,
                false => Some(self.behind.read_checkpoint(source, &self.id).await),
            }
        };
        let (at_source, at_target, ahead) = tokio::join!(at_source, self.behind.read_checkpoint(target, &self.id), ahead);
        let at_target = match at_target {
            Err(error) if error.is_missing_database() && self.parameters.create_target => {
                target.create(&self.parameters.create_target_params).await?;
                None
            }
            other => other?,
        };
        let stands = |at_source: AtSource<'_>| {
            ahead.as_ref().is_some_and(|ahead| stands(&ahead.position, ahead.news, at_source, at_target.as_ref()))
        };
        let is_source_left_out = skips_source && stands(AtSource::NotAsked);
        let at_source = match at_source {
            Some(at_source) => at_source,
            None if is_source_left_out => Ok(None),
            None => self.behind.read_checkpoint(source, &self.id).await,
        };
        let (at_source, source_refuses) = match at_source {
            // A source that lets us read and not look at its local documents takes no checkpoint either.
            Err(error) if error.is_refusal() => (None, true),
            other => (other?, false),
        };
        let stands = is_source_left_out || stands(AtSource::Says(at_source.as_ref()));
        if let Some(Ahead { position: Position { since, anchor, source_behind, overlap, .. }, page, .. }) = ahead
            && stands
        {
            return Ok(Begin { page: page?, since, anchor: Some(anchor), source_behind, overlap, is_known: true });
        }
        self.behind.forget(&self.id, slot);
        self.compare(at_source, at_target, source_refuses, slot).await
    }

    /// Nothing is known that can be trusted: the histories say how far both sides agree.
    async fn compare(
        &self,
        at_source: Option<Checkpoint>,
        at_target: Option<Checkpoint>,
        source_refuses: bool,
        slot: &mut Slot,
    ) -> Result<Begin> {
        let source = &self.transfer.source;
        let alone = match &at_target {
            Some(checkpoint) if at_source.is_none() && checkpoint.source_refused.is_some() => {
                checkpoint.trusted_alone(&source.instance_start_time().await?).cloned()
            }
            _ => None,
        };
        let ancestor = alone.clone().or_else(|| common_ancestor(at_source.as_ref(), at_target.as_ref()));
        let is_known = ancestor.is_some();
        let since = ancestor.unwrap_or_else(|| self.first());
        let session_of = |checkpoint: &Option<Checkpoint>| checkpoint.as_ref().and_then(|it| it.session_id.clone());
        let (anchor, source_behind) = match (session_of(&at_source), session_of(&at_target)) {
            // The target is ahead where it alone was written since.
            (Some(at_source), Some(at_target)) if is_known => {
                let is_equal = at_source == at_target;
                let behind = if is_equal { SourceBehind::equal_now() } else { SourceBehind::unknown() };
                (Anchor { at_target, at_source: Some(at_source) }, behind)
            }
            (None, Some(at_target)) if alone.is_some() => (Anchor { at_target, at_source: None }, SourceBehind::unknown()),
            _ => {
                let begun = self.unsaved(since.clone(), SystemTime::now());
                let written =
                    self.behind.write(&self.id, &begun, &since, at_source.as_ref(), at_target.as_ref(), source_refuses).await?;
                (written.ok_or_else(|| self.moved())?, SourceBehind::equal_now())
            }
        };
        let is_known = is_known && source_behind.is_known();
        let (at, epoch) = (anchor.clone(), self.behind.slots.epoch());
        slot.position =
            Some(Position { since: since.clone(), anchor: at, source_behind, has_new_documents: true, overlap: None, epoch });
        let page = self.read(since.clone()).await?;
        Ok(Begin { page, since, anchor: Some(anchor), source_behind, overlap: None, is_known })
    }

    fn unsaved(&self, start: Seq, started: SystemTime) -> Unsaved {
        Unsaved {
            replicator_id: self.replicator_id.clone(),
            source: self.transfer.source.clone(),
            target: self.transfer.target.clone(),
            start,
            counts: Counts::default(),
            written: Written::new(&self.behind.remembered),
            started,
            since: Instant::now(),
        }
    }

    fn first(&self) -> Seq {
        self.parameters.since_seq.clone().unwrap_or_else(Seq::zero)
    }

    fn limit(&self) -> usize {
        self.parameters.batch_size.unwrap_or(PAGE_ROWS)
    }

    async fn read_news(&self, position: &Position) -> Ahead {
        let position = position.clone();
        match self.read_ahead(&position).await {
            Ok((news, page)) => Ahead { position, news, page: Ok(page) },
            Err(TransferError::Peer(error)) if error.error.is_unknown_seq() => {
                Ahead { position, news: News::UnknownSeq, page: Err(error.into()) }
            }
            Err(error) => Ahead { position, news: News::Failed, page: Err(error) },
        }
    }

    async fn read_ahead(&self, position: &Position) -> Result<(News, Arc<Page>)> {
        let mut page = self.read_after(position, position.overlap.as_deref()).await?;
        let news_of = |page: &Page| News::of_page(&position.since, &page.last_seq, page.rows.is_empty());
        if news_of(&page) == News::WentBack {
            return Ok((News::WentBack, page));
        }
        match position.overlap.as_ref().map(|overlap| overlap.find(&page, !self.parameters.winning_revs_only)) {
            None => {}
            Some(Found::Same(rest)) if rest.rows.is_empty() && rest.pending != Some(0) => {
                page = self.read_after(position, None).await?;
            }
            Some(Found::Same(rest)) => page = Arc::new(rest),
            Some(Found::Unsure(read)) if self.behind.had(&self.transfer.source, read.clone()).await? => {}
            Some(Found::Unsure(_) | Found::Gone) => return Ok((News::WentBack, page)),
        }
        Ok((news_of(&page), page))
    }

    /// What comes after a known position is little, mostly, and where it was first revisions the last time, with them.
    async fn read_after(&self, position: &Position, overlap: Option<&Overlap>) -> Result<Arc<Page>> {
        let since = overlap.map_or(&position.since, |overlap| &overlap.since);
        let (asked, again) = (self.changes(Some(since.clone())), overlap.map_or(0, Overlap::rows));
        match position.has_new_documents && !self.is_bidirectional && matches!(since, Seq::Text(_)) {
            true => {
                let limit = asked.limit.min(NEWS_ROWS) + again;
                let asked = ChangesRequest { limit, with_docs: true, ..asked };
                Ok(self.transfer.shared.changes(&self.transfer.source, asked).await?)
            }
            false => self.read_some(since.clone(), again).await,
        }
    }

    /// A selection tells of a part only, and a source that counts (PouchDB) may be another one with the same numbers.
    fn overlap(&self, page: &Page, since: &Seq) -> Option<Arc<Overlap>> {
        let is_whole = matches!(self.parameters.selection, Selection::All) && matches!(since, Seq::Text(_));
        let overlap = is_whole.then(|| Overlap::of(page, since, &self.behind.overlapping)).flatten();
        overlap.map(Arc::new)
    }

    async fn read(&self, since: Seq) -> Result<Arc<Page>> {
        self.read_some(since, 0).await
    }

    async fn read_some(&self, since: Seq, again: usize) -> Result<Arc<Page>> {
        let source: &Peer = &self.transfer.source;
        let asked = self.changes(Some(since.clone()));
        let limit = asked.limit + again;
        let page = self.transfer.shared.changes(source, ChangesRequest { limit, ..asked }).await?;
        // A server that counts (PouchDB): a database that was made again is behind the old one's position.
        match (&since, &page.last_seq) {
            (Seq::Number(since), Seq::Number(last)) if last < since => {
                Ok(self.transfer.shared.changes(source, self.changes(None)).await?)
            }
            _ => Ok(page),
        }
    }

    fn changes(&self, since: Option<Seq>) -> ChangesRequest {
        let style = match self.parameters.winning_revs_only {
            true => "main_only",
            false => "all_docs",
        };
        let mut query = vec![(String::from("style"), String::from(style))];
        let mut filter = |name: &str| query.push((String::from("filter"), String::from(name)));
        let body = match &self.parameters.selection {
            Selection::All => None,
            Selection::DocIds(ids) => {
                filter("_doc_ids");
                Some(json!({ "doc_ids": ids }).to_string().into())
            }
            Selection::Selector(selector) => {
                filter("_selector");
                Some(json!({ "selector": selector }).to_string().into())
            }
            Selection::Filter { name, query: params } => {
                filter(name);
                query.extend(params.iter().cloned());
                None
            }
        };
        ChangesRequest { since, limit: self.limit(), with_docs: false, query: query.into(), body }
    }
}

fn is_first(row: &ChangesRow) -> bool {
    matches!(row.revs.as_slice(), [rev] if rev.starts_with("1-"))
}
