//! A model of a disk: what was not made durable may or may not be there after a crash. Every crash of a publication is tried.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Names to contents; a directory is the names below it. What has been done since names were last durable is kept as a list of states.
#[derive(Clone, Debug, Default)]
struct State {
    files: BTreeMap<PathBuf, &'static str>,
    dirs: BTreeSet<PathBuf>,
}

#[derive(Default)]
struct Model {
    now: RefCell<State>,
    /// States of the names that a crash may show, the oldest first.
    possible: RefCell<Vec<State>>,
    /// Contents that are durable; others are empty after a crash.
    durable: RefCell<BTreeSet<&'static str>>,
    /// Operations until the power goes; what is left of them.
    left: RefCell<usize>,
    exchanges: bool,
}

const LOST: &str = "the power went";

impl Model {
    /// An old output and a new one on its way to replace it.
    fn new(old: bool, exchanges: bool, operations: usize) -> Self {
        let mut durable = State::default();
        durable.dirs.extend(["", "out.partial"].map(PathBuf::from));
        if old {
            durable.dirs.insert("out".into());
            durable.files.insert("out/a".into(), "old a");
            durable.files.insert("out/b".into(), "old b");
        }
        let mut now = durable.clone();
        now.dirs.extend(["out.partial/complete", "out.partial/complete/sub"].map(PathBuf::from));
        now.files.insert("out.partial/complete/a".into(), "new a");
        now.files.insert("out.partial/complete/sub/b".into(), "new b");
        let model = Self { exchanges, left: RefCell::new(operations), ..Self::default() };
        model.durable.borrow_mut().extend(["old a", "old b"]);
        *model.possible.borrow_mut() = vec![durable, now.clone()];
        *model.now.borrow_mut() = now;
        model
    }

    fn step(&self) -> io::Result<()> {
        let mut left = self.left.borrow_mut();
        *left = left.checked_sub(1).ok_or_else(|| io::Error::other(LOST))?;
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut State)) -> io::Result<()> {
        self.step()?;
        change(&mut self.now.borrow_mut());
        self.possible.borrow_mut().push(self.now.borrow().clone());
        Ok(())
    }

    /// What the disk may hold after the crash.
    fn after_crash(&self) -> Vec<State> {
        let durable = self.durable.borrow();
        let torn = |state: &State| {
            let mut state = state.clone();
            state.files.values_mut().filter(|content| !durable.contains(**content)).for_each(|content| *content = "");
            state
        };
        self.possible.borrow().iter().map(torn).collect()
    }
}

impl State {
    fn moved(&mut self, from: &Path, to: &Path) {
        let under = |path: &PathBuf| path.strip_prefix(from).ok().map(|rest| to.join(rest));
        let files: Vec<_> = self.files.iter().filter_map(|(path, &c)| Some((path.clone(), under(path)?, c))).collect();
        for (old, new, content) in files {
            self.files.remove(&old);
            self.files.insert(new, content);
        }
        let dirs: Vec<_> = self.dirs.iter().filter_map(|path| Some((path.clone(), under(path)?))).collect();
        for (old, new) in dirs {
            self.dirs.remove(&old);
            self.dirs.insert(new.components().collect());
        }
    }

    fn below(&self, dir: &str) -> Vec<&'static str> {
        self.files.iter().filter(|(path, _)| path.starts_with(dir)).map(|(_, content)| *content).collect()
    }
}

impl Disk for Model {
    fn list(&self, dir: &Path) -> io::Result<Vec<(PathBuf, bool)>> {
        let now = self.now.borrow();
        let files = now.files.keys().map(|path| (path.clone(), false));
        let all = files.chain(now.dirs.iter().map(|path| (path.clone(), true)));
        Ok(all.filter(|(path, _)| path.parent() == Some(dir)).collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let now = self.now.borrow();
        Ok(now.dirs.contains(path) || now.files.contains_key(path))
    }

    fn sync_file(&self, file: &Path) -> io::Result<()> {
        self.step()?;
        let content = self.now.borrow().files[file];
        self.durable.borrow_mut().insert(content);
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        self.step()?;
        *self.possible.borrow_mut() = vec![self.now.borrow().clone()];
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        assert!(!self.exists(to)?, "{to:?} is renamed over");
        self.change(|state| state.moved(from, to))
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<bool> {
        if !self.exchanges {
            return Ok(false);
        }
        let between = Path::new("between");
        self.change(|state| {
            state.moved(a, between);
            state.moved(b, a);
            state.moved(between, b);
        })?;
        Ok(true)
    }

    fn remove_tree(&self, dir: &Path) -> io::Result<()> {
        // One name after the other: a crash may leave some.
        let files: Vec<PathBuf> = self.now.borrow().files.keys().filter(|p| p.starts_with(dir)).cloned().collect();
        for file in files {
            self.change(|state| {
                state.files.remove(&file);
            })?;
        }
        self.change(|state| state.dirs.retain(|path| !path.starts_with(dir)))
    }
}

const OLD: [&str; 2] = ["old a", "old b"];
const NEW: [&str; 2] = ["new a", "new b"];

/// Publishes with the power going after so many operations, and looks at all that the disk may hold then.
fn crash(old: bool, exchanges: bool, operations: usize) -> bool {
    let model = Model::new(old, exchanges, operations);
    let [staged, target, aside] = ["out.partial/complete", "out", "out.partial/replaced"].map(Path::new);
    let result = publish(&model, staged, target, aside);
    let finished = *model.left.borrow() > 0 && result.is_ok();
    for state in model.after_crash() {
        let again = Model { left: RefCell::new(usize::MAX), exchanges, ..Model::default() };
        *again.now.borrow_mut() = state;
        restore(&again, target, aside).unwrap();
        let found = again.now.borrow().below("out");
        let whole = found == NEW || (old && found == OLD) || (!old && !again.exists(target).unwrap());
        assert!(whole, "old {old}, exchange {exchanges}, {operations} operations: {found:?}");
        assert!(!finished || found == NEW, "published, and gone after a crash");
    }
    finished
}

#[test]
fn every_crash_leaves_the_old_or_the_new_output_whole() {
    for (old, exchanges) in [(false, true), (true, true), (true, false)] {
        let needed = (0..100).position(|operations| crash(old, exchanges, operations)).unwrap();
        assert!(needed > 6, "{needed} operations");
    }
}

#[test]
fn the_model_of_the_disk_sees_what_was_not_made_durable() {
    // The negative control: the same renames without making anything durable first.
    let model = Model::new(true, true, usize::MAX);
    assert!(model.exchange(Path::new("out.partial/complete"), Path::new("out")).unwrap());
    assert!(model.after_crash().iter().any(|state| state.below("out") == ["", ""]));
}

#[test]
fn on_a_real_disk() {
    let place = tempfile::tempdir().unwrap();
    let [staged, target, aside] = ["staged", "out", "aside"].map(|name| place.path().join(name));
    for content in ["one", "two"] {
        create_dir_durably(&staged.join("sub")).unwrap();
        write_file(&staged.join("sub/file"), content.as_bytes()).unwrap();
        publish(&System, &staged, &target, &aside).unwrap();
        assert_eq!(fs::read_to_string(target.join("sub/file")).unwrap(), content);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }
    fs::rename(&target, &aside).unwrap();
    restore(&System, &target, &aside).unwrap();
    assert_eq!(fs::read_to_string(target.join("sub/file")).unwrap(), "two");
    copy_file(&target.join("sub/file"), &place.path().join("copy")).unwrap();
    assert_eq!(fs::read_to_string(place.path().join("copy")).unwrap(), "two");
}
