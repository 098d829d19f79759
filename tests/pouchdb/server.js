// A PouchDB behind express-pouchdb, with what that lacks of a CouchDB: the global changes, `_dbs_info`, `_local_docs`, names
// with a slash, a continuous feed whose heartbeat is in milliseconds, and a login. Its sequence numbers are integers, and a
// database that is made again starts at 1: that is what the tests want it for.
//
//   node server.js [port] [user] [password]       port 0 takes a free one; the first line printed is the URL
'use strict';

const express = require('express');
const expressPouchDB = require('express-pouchdb');
const { getOrCreateDB, deleteDB } = require('express-pouchdb/lib/create-or-delete-dbs');
const PouchDB = require('pouchdb-core')
  .plugin(require('pouchdb-adapter-memory'))
  .plugin(require('pouchdb-adapter-http'))
  .plugin(require('pouchdb-mapreduce'))
  .plugin(require('pouchdb-replication'))
  .plugin(require('pouchdb-find'));

const port = Number(process.argv[2] || 0);
const user = process.argv[3] || 'admin';
const password = process.argv[4] || 'secret';
const uuid = require('crypto').randomUUID().replaceAll('-', '');
const startedAt = String(Math.floor(Date.now() / 1000));
const GLOBAL = '_global_changes';
// CouchDB's is 500 ms; the tests need not wait that long.
const GLOBAL_FLUSH_MS = 50;

// -- databases ------------------------------------------------------------------------------------------------------------

const Local = PouchDB.defaults({ adapter: 'memory' });
const names = new Set();
const watchers = new Map();
const security = new Map();

// express-pouchdb cuts a slash out of a name; inside, it travels as `~2f`.
const inner = (name) => name.replace(/[^a-z0-9_$()+-]/g, (c) => '~' + c.charCodeAt(0).toString(16));
Local.allDbs = (callback) => {
  const all = [...names].map(inner).sort();
  if (callback) callback(null, all);
  return Promise.resolve(all);
};
const open = (name) => getOrCreateDB(Local, inner(name));

async function create(name) {
  names.add(name);
  const db = await open(name);
  if (name === GLOBAL) return;
  const watcher = db.changes({ live: true, since: 'now' });
  watcher.on('change', () => note('updated', name));
  watcher.on('error', () => {});
  watchers.set(name, watcher);
  note('created', name);
}

async function destroy(name) {
  watchers.get(name)?.cancel();
  watchers.delete(name);
  security.delete(name);
  names.delete(name);
  await deleteDB(Local, inner(name), {});
  if (name === GLOBAL) globalRevs.clear();
  else note('deleted', name);
}

async function info(name) {
  const db = await open(name);
  const found = await db.info();
  const deleted = await db.changes({ since: 0, live: false }).then((all) => all.results.filter((row) => row.deleted).length);
  return {
    db_name: name,
    update_seq: found.update_seq,
    doc_count: found.doc_count,
    doc_del_count: deleted,
    // As express-pouchdb has it: the process's start, so that it says nothing about the database.
    instance_start_time: startedAt,
    purge_seq: 0,
    compact_running: false,
    disk_format_version: 8,
    sizes: { file: 0, external: 0, active: 0 },
    props: {},
    cluster: { q: 1, n: 1, w: 1, r: 1 },
  };
}

// -- _global_changes: one row for each (event, name), written together a moment later ---------------------------------------

const globalPending = new Set();
const globalRevs = new Map();
let globalTimer = null;

function note(event, name) {
  globalPending.add(`${event}:${name}`);
  globalTimer ??= setTimeout(flushGlobal, GLOBAL_FLUSH_MS);
}

async function flushGlobal() {
  const ids = [...globalPending];
  globalPending.clear();
  try {
    if (names.has(GLOBAL)) {
      const db = await open(GLOBAL);
      const docs = ids.map((_id) => (globalRevs.has(_id) ? { _id, _rev: globalRevs.get(_id) } : { _id }));
      for (const row of await db.bulkDocs(docs)) {
        if (row.ok) globalRevs.set(row.id, row.rev);
        // Somebody else wrote the row: its revision is read again, and the event is told later.
        else if (row.status === 409) {
          globalRevs.set(row.id, (await db.get(row.id).catch(() => ({})))._rev);
          globalPending.add(row.id);
        }
      }
    }
  } catch (error) {
    console.error(`global changes: ${error.message}`);
  }
  globalTimer = globalPending.size ? setTimeout(flushGlobal, GLOBAL_FLUSH_MS) : null;
}

// -- answers --------------------------------------------------------------------------------------------------------------

const app = express();
app.disable('x-powered-by');
app.disable('etag');
const json = express.json({ limit: '1gb', type: () => true });

const fail = (res, status, error, reason) => res.status(status).json({ error, reason });
const failWith = (res, error) => {
  const status = error.status || 500;
  fail(res, status, error.error === true || !error.error ? error.name || 'error' : error.error, error.reason || error.message);
};
const handle = (work) => (req, res) => work(req, res).catch((error) => (res.headersSent ? res.destroy() : failWith(res, error)));

app.use((req, res, next) => {
  if (req.path === '/_up') return next();
  const wanted = 'Basic ' + Buffer.from(`${user}:${password}`).toString('base64');
  const given = req.get('authorization');
  if (given === wanted) return next();
  fail(res, 401, 'unauthorized', given ? 'Name or password is incorrect.' : 'You are not a server admin.');
});

// The database's name, decoded, and the rest of the path, as it came.
app.use((req, res, next) => {
  const match = /^\/([^/?]+)(\/[^?]*)?(\?.*)?$/.exec(req.url);
  if (!match) return next();
  try {
    req.dbName = decodeURIComponent(match[1]);
  } catch {
    return fail(res, 400, 'bad_request', 'the path is not well encoded');
  }
  req.rest = match[2] === '/' ? '' : match[2] || '';
  next();
});

app.get('/', (req, res) => res.json({ couchdb: 'Welcome', version: '3.0.0-pouchdb', uuid, vendor: { name: 'PouchDB' }, features: [] }));
app.get('/_up', (req, res) => res.json({ status: 'ok', seeds: {} }));
app.get('/_all_dbs', (req, res) => res.json([...names].sort()));
app.get('/_session', (req, res) =>
  res.json({ ok: true, userCtx: { name: user, roles: ['_admin'] }, info: { authenticated: 'default' } })
);
app.get('/_active_tasks', (req, res) => res.json([]));
app.get('/_uuids', (req, res) => {
  const count = Math.min(Number(req.query.count) || 1, 1000);
  res.json({ uuids: Array.from({ length: count }, () => require('crypto').randomUUID().replaceAll('-', '')) });
});

app.post('/_dbs_info', json, handle(async (req, res) => {
  if (!Array.isArray(req.body.keys)) return fail(res, 400, 'bad_request', '`keys` member must exist.');
  if (req.body.keys.length > 100) return fail(res, 400, 'bad_request', '`keys` member exceeds max allowed size');
  const row = async (key) => (names.has(key) ? { key, info: await info(key) } : { key, error: 'not_found' });
  res.json(await Promise.all(req.body.keys.map(row)));
}));

app.post('/_replicate', json, handle(replicate));

// -- one database -----------------------------------------------------------------------------------------------------------

const LEGAL = /^[a-z][a-z0-9_$()+/-]*$/;
const SYSTEM = ['_users', '_replicator', GLOBAL];

app.use((req, res, next) => {
  if (req.dbName === undefined || req.dbName === 'favicon.ico') return next();
  if (req.rest === '' && req.method === 'PUT') {
    return handle(async () => {
      if (!LEGAL.test(req.dbName) && !SYSTEM.includes(req.dbName)) {
        return fail(res, 400, 'illegal_database_name', `Name: '${req.dbName}'. Only lowercase characters (a-z), …`);
      }
      if (names.has(req.dbName)) return fail(res, 412, 'file_exists', 'The database could not be created, the file already exists.');
      await create(req.dbName);
      res.status(201).json({ ok: true });
    })(req, res);
  }
  if (!names.has(req.dbName)) return fail(res, 404, 'not_found', 'Database does not exist.');
  // CouchDB reads a document whatever its type is said to be; express reads only what is called JSON.
  const kind = req.get('content-type');
  if (!kind || kind.startsWith('application/x-www-form-urlencoded')) req.headers['content-type'] = 'application/json';
  const own = routes[`${req.method} ${req.rest}`];
  if (own) return json(req, res, (error) => (error ? fail(res, 400, 'bad_request', 'invalid UTF-8 JSON') : handle(own)(req, res)));
  req.url = '/' + encodeURIComponent(inner(req.dbName)) + (req.rest || '') + (req.url.includes('?') ? req.url.slice(req.url.indexOf('?')) : '');
  next();
});

const routes = {
  'GET ': async (req, res) => res.json(await info(req.dbName)),
  'HEAD ': async (req, res) => res.status(200).end(),
  'DELETE ': async (req, res) => {
    await destroy(req.dbName);
    res.json({ ok: true });
  },
  'POST /_ensure_full_commit': async (req, res) => res.status(201).json({ ok: true, instance_start_time: '0' }),
  'GET /_security': async (req, res) => res.json(security.get(req.dbName) || {}),
  'PUT /_security': async (req, res) => {
    security.set(req.dbName, req.body);
    res.json({ ok: true });
  },
  'POST /_local_docs': localDocs,
  'POST /_bulk_get': bulkGet,
  'GET /_changes': changes,
  'POST /_changes': changes,
};

async function localDocs(req, res) {
  const db = await open(req.dbName);
  const rows = [];
  for (const key of req.body.keys || []) {
    try {
      const doc = await db.get(key);
      const row = { id: key, key, value: { rev: doc._rev } };
      rows.push(req.query.include_docs === 'true' || req.body.include_docs ? { ...row, doc } : row);
    } catch {
      rows.push({ key, error: 'not_found' });
    }
  }
  res.json({ total_rows: null, offset: null, rows });
}

// Leaf by leaf, because PouchDB's own `latest` throws outside of any promise where it does not know a revision.
async function bulkGet(req, res) {
  const flag = (name) => req.query[name] === 'true' || req.body[name] === true;
  const db = await open(req.dbName);
  const options = { revs: flag('revs'), attachments: flag('attachments') };
  const find = async ({ id, rev }) => {
    if (rev === undefined) return [{ ok: await db.get(id, options) }];
    if (!flag('latest')) return [{ ok: await db.get(id, { ...options, rev }) }];
    const [number, hash] = rev.split('-');
    const leaves = await db.get(id, { ...options, revs: true, open_revs: 'all' });
    const above = leaves.filter(({ ok }) => ok && ok._revisions.ids[ok._revisions.start - Number(number)] === hash);
    if (!above.length) throw new Error('missing');
    if (!options.revs) above.forEach(({ ok }) => delete ok._revisions);
    return above;
  };
  const results = [];
  for (const wanted of req.body.docs) {
    const missing = { id: wanted.id, rev: wanted.rev || 'undefined', error: 'not_found', reason: 'missing' };
    results.push({ id: wanted.id, docs: await find(wanted).catch(() => [{ error: missing }]) });
  }
  res.json({ results });
}

// -- _changes ---------------------------------------------------------------------------------------------------------------

function changeOptions(req) {
  const body = req.method === 'POST' && req.body ? req.body : {};
  const query = req.query;
  const options = { since: 0, style: query.style || 'main_only' };
  if (query.since === 'now') options.since = 'now';
  else if (query.since !== undefined) options.since = Number(String(query.since).replaceAll('"', '')) || 0;
  for (const flag of ['include_docs', 'conflicts', 'attachments', 'descending']) {
    if (query[flag] === 'true') options[flag] = true;
  }
  if (query.limit !== undefined) options.limit = Number(query.limit);
  if (query.filter === '_selector') options.selector = body.selector || {};
  else if (query.filter === '_doc_ids') options.doc_ids = body.doc_ids || JSON.parse(query.doc_ids || '[]');
  else if (query.filter) {
    options.filter = query.filter;
    options.query_params = query;
    options.view = query.view;
  }
  return options;
}

async function changes(req, res) {
  const db = await open(req.dbName);
  const options = changeOptions(req);
  if (options.since === 'now') options.since = (await db.info()).update_seq;
  const { feed } = req.query;
  if (feed === 'continuous' || feed === 'longpoll') return live(db, options, req, res, feed);
  // PouchDB takes a limit of 0 for 1.
  const page = options.limit === 0 ? { results: [], last_seq: options.since } : await db.changes(options);
  res.json({ results: page.results, last_seq: page.last_seq, pending: await pendingAfter(db, options, page) });
}

async function pendingAfter(db, options, page) {
  if (options.limit === undefined || page.results.length < options.limit || options.descending) return 0;
  const rest = await db.changes({ ...options, since: page.last_seq, limit: undefined, include_docs: false });
  return rest.results.length;
}

async function live(db, options, req, res, feed) {
  const heartbeatMs = req.query.heartbeat === 'true' ? 60000 : Number(req.query.heartbeat) || 0;
  const timeoutMs = Math.min(Number(req.query.timeout) || 60000, 60000);
  const longpoll = feed === 'longpoll';
  let last = options.since;
  let sent = 0;
  let timer = null;
  let watcher = null;
  res.status(200).set('content-type', 'application/json');
  res.flushHeaders();
  if (longpoll) res.write('{"results":[\n');

  const end = () => {
    clearInterval(timer);
    clearTimeout(timer);
    watcher?.cancel();
    if (res.writableEnded) return;
    res.end(longpoll ? `],\n"last_seq":${last},"pending":0}\n` : `${JSON.stringify({ last_seq: last, pending: 0 })}\n`);
  };
  const wind = () => {
    clearTimeout(timer);
    timer = heartbeatMs ? setInterval(() => res.write('\n'), heartbeatMs) : setTimeout(end, timeoutMs);
  };
  wind();
  const row = (change) => {
    if (res.writableEnded) return;
    res.write((longpoll && sent ? ',\n' : '') + JSON.stringify(change) + (longpoll ? '' : '\n'));
    last = change.seq;
    sent += 1;
    if (!heartbeatMs) wind();
    if (options.limit && sent >= options.limit) end();
  };
  res.on('close', () => {
    clearInterval(timer);
    watcher?.cancel();
  });
  if (longpoll) {
    const page = await db.changes(options);
    page.results.forEach(row);
    if (sent) return end();
    watcher = db.changes({ ...options, limit: undefined, live: true });
    watcher.on('change', (change) => {
      if (!sent) row(change);
      end();
    });
  } else {
    watcher = db.changes({ ...options, limit: undefined, live: true });
    watcher.on('change', row);
  }
  watcher.on('error', end);
  // The database was deleted: the feed ends. Every feed listens, so there is no right number of listeners.
  db.setMaxListeners(0);
  db.once('destroyed', end);
  res.on('close', () => db.removeListener('destroyed', end));
}

// -- _replicate, one-shot -----------------------------------------------------------------------------------------------------

async function endpoint(given, createTarget) {
  const { url, auth, headers } = typeof given === 'string' ? { url: given } : given;
  let local = /^https?:/.test(url) ? null : url;
  const parsed = local === null ? new URL(url) : null;
  if (parsed && ['127.0.0.1', 'localhost'].includes(parsed.hostname) && Number(parsed.port) === app.port) {
    const login = auth?.basic || { username: decodeURIComponent(parsed.username), password: decodeURIComponent(parsed.password) };
    const basic = Object.entries(headers || {}).find(([name]) => name.toLowerCase() === 'authorization')?.[1];
    const wanted = 'Basic ' + Buffer.from(`${user}:${password}`).toString('base64');
    if (basic ? basic !== wanted : login.username !== user || login.password !== password) {
      throw Object.assign(new Error(`unauthorized to access or create database ${parsed.host}${parsed.pathname}`), {
        status: 401,
        name: 'unauthorized',
      });
    }
    local = decodeURIComponent(parsed.pathname.replace(/^\/|\/$/g, ''));
  }
  if (local !== null) {
    if (!names.has(local)) {
      if (!createTarget) throw Object.assign(new Error(`could not open ${local}`), { status: 404, name: 'db_not_found' });
      await create(local);
    }
    return open(local);
  }
  const options = { skip_setup: !createTarget };
  const basic = auth?.basic;
  if (basic) options.auth = { username: basic.username, password: basic.password };
  if (headers) {
    options.fetch = (address, opts) => {
      for (const [name, value] of Object.entries(headers)) opts.headers.set(name, value);
      return PouchDB.fetch(address, opts);
    };
  }
  const db = new PouchDB(url, options);
  const found = await db.info();
  if (found.error || found.update_seq === undefined) {
    throw Object.assign(new Error(`could not open ${url.replace(/\/\/[^@]*@/, '//')}`), { status: 404, name: 'db_not_found' });
  }
  return db;
}

async function replicate(req, res) {
  const { source, target, create_target: createTarget, doc_ids, selector, filter, query_params, since_seq } = req.body;
  if (!source || !target) return fail(res, 400, 'bad_request', 'Missing required replication parameter');
  const from = await endpoint(source, false);
  const to = await endpoint(target, createTarget);
  const options = { doc_ids, selector, filter, query_params, since: since_seq };
  Object.keys(options).forEach((key) => options[key] === undefined && delete options[key]);
  const result = await PouchDB.replicate(from, to, options);
  const history = {
    session_id: uuid,
    start_time: result.start_time,
    end_time: result.end_time,
    docs_read: result.docs_read,
    docs_written: result.docs_written,
    doc_write_failures: result.doc_write_failures,
    missing_checked: result.docs_read,
    missing_found: result.docs_read,
    end_last_seq: result.last_seq,
    recorded_seq: result.last_seq,
  };
  const noChanges = result.docs_read === 0 ? { no_changes: true } : {};
  res.json({ ok: true, ...noChanges, session_id: uuid, source_last_seq: result.last_seq, replication_id_version: 4, history: [history] });
}

// -- the rest is express-pouchdb's --------------------------------------------------------------------------------------------

app.use(expressPouchDB(Local, { mode: 'minimumForPouchDB', overrideMode: { include: ['routes/find'], exclude: ['compression'] } }));

process.on('unhandledRejection', (error) => console.error(`unhandled: ${error && error.message}`));
process.on('uncaughtException', (error) => console.error(`uncaught: ${error.stack}`));
// The child must not outlive the tests: its standard input ends with them.
process.stdin.on('end', () => process.exit(0)).resume();

(async () => {
  for (const name of SYSTEM) await create(name);
  const listener = app.listen(port, '127.0.0.1', () => {
    app.port = listener.address().port;
    console.log(`http://127.0.0.1:${app.port}`);
  });
  listener.keepAliveTimeout = 60000;
})();
