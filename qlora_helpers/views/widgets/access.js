// Runs once for each panel, as the onload of a style element inside it: see access.py. No comment may stand behind code.
(root => {
  if (!root || root.qloraAccess) return;
  root.qloraAccess = true;
  const set = (node, name, value) => { if (node && node.getAttribute(name) !== value) node.setAttribute(name, value); };
  const text = node => (node ? node.textContent.trim() : '');
  let count = 0;
  const id = node => { if (!node.id) node.id = 'qlora-' + Math.random().toString(36).slice(2) + count++; return node.id; };
  const mark = () => {
    root.querySelectorAll('.qlora-field').forEach(field => {
      const name = text(field.querySelector('.widget-label'));
      const box = field.querySelector('.qlora-number input');
      const handle = field.querySelector('.noUi-handle');
      set(handle, 'aria-label', name + ', slider');
      if (handle && box) set(handle, 'aria-valuetext', box.value);
      const wrong = field.classList.contains('qlora-wrong');
      const parts = [field.querySelector('.qlora-field-error .qlora-error'), field.querySelector('.qlora-help')];
      const about = parts.filter(part => part).map(id).join(' ');
      field.querySelectorAll('input, select, textarea').forEach(control => {
        if (about) set(control, 'aria-describedby', about);
        set(control, 'aria-invalid', wrong ? 'true' : 'false');
      });
      const automatic = field.querySelector('.qlora-automatic input');
      set(automatic, 'aria-label', name + ', automatic');
    });
    root.querySelectorAll('.widget-slider:not(.qlora-field *)').forEach(slider => {
      const handle = slider.querySelector('.noUi-handle');
      set(handle, 'aria-label', text(slider.querySelector('.widget-label')) + ', slider');
      set(handle, 'aria-valuetext', text(slider.querySelector('.widget-readout')));
      set(slider.querySelector('.widget-readout'), 'aria-label', text(slider.querySelector('.widget-label')));
    });
    root.querySelectorAll('input, select, textarea').forEach(control => {
      const named = [...(control.labels || [])].some(text) || control.hasAttribute('aria-label');
      const title = control.title || (control.closest('[title]') || control).title;
      if (!named && title) set(control, 'aria-label', title.split(';')[0]);
    });
    root.querySelectorAll('.widget-toggle-buttons').forEach(group => {
      set(group, 'role', 'group');
      const label = text(group.querySelector('.widget-label')) || group.title || 'choice';
      set(group, 'aria-label', label);
      group.querySelectorAll('button').forEach(button => {
        set(button, 'aria-pressed', button.classList.contains('mod-active') ? 'true' : 'false');
      });
    });
    root.querySelectorAll('.qlora-more-button').forEach(button => {
      set(button, 'aria-expanded', button.classList.contains('qlora-open') ? 'true' : 'false');
    });
  };
  let waiting = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; mark(); setTimeout(mark, 300); });
  };
  const watched = {subtree: true, childList: true, attributes: true, attributeFilter: ['class', 'style', 'aria-valuenow']};
  new MutationObserver(soon).observe(root, watched);
  root.addEventListener('change', soon);
  soon();
})(this.closest('.qlora-panel'));
