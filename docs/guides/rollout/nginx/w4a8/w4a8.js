// What nginx cannot do without reading JSON: cap answers in length and number, and ask for a copy's answer in one piece.

// The names that a limit may have. `unset`: whether a server without any answers to the end of its context.
const LIMITS = {
    '/v1/chat/completions': {names: ['max_completion_tokens', 'max_tokens'], fill: 'max_tokens', unset: true},
    '/v1/completions': {names: ['max_tokens'], fill: 'max_tokens', unset: false},
    '/v1/messages': {names: ['max_tokens'], fill: 'max_tokens', unset: false},
    '/v1/responses': {names: ['max_output_tokens'], fill: 'max_output_tokens', unset: true},
};

function refuse(r, status, message, param) {
    const type = 'BadRequestError';
    r.headersOut['Content-Type'] = 'application/json';
    r.return(status, JSON.stringify({error: {message: message, type: type, param: param || null, code: status}}));
}

// A list of prompts is one of texts or of lists of tokens; a list of tokens is one prompt.
function prompts(list) {
    return Array.isArray(list) && typeof list[0] !== 'number' ? list.length : 1;
}

// What is wrong with the number of answers that a body asks for, if it is; `n` of each prompt.
function manyAnswers(body, most) {
    const names = ['n', 'best_of'];
    let each = 1;
    for (let i = 0; i < names.length; i++) {
        const value = body[names[i]];
        if (value === undefined || value === null) {
            continue;
        } else if (typeof value !== 'number' || !(value <= most)) {
            return {message: names[i] + ' must be a number of at most ' + most, param: names[i]};
        }
        each = Math.max(each, value);
    }
    const lists = ['prompt', 'prompt_embeds'];
    for (let i = 0; i < lists.length; i++) {
        if (!(each * prompts(body[lists[i]]) <= most)) {
            return {message: 'a request may ask for ' + most + ' answers in all', param: lists[i]};
        }
    }
    return null;
}

function admit(r) {
    if (r.method !== 'POST') {
        r.internalRedirect('@serve');
        return;
    }
    let text, body;
    try {
        text = r.requestText;
        body = JSON.parse(text);
    } catch (error) {
        refuse(r, 400, 'the body is no JSON that this proxy can read: ' + error.message);
        return;
    }
    if (body === null || typeof body !== 'object' || Array.isArray(body)) {
        refuse(r, 400, 'the body is no JSON object');
        return;
    }
    const tooMany = manyAnswers(body, Number(r.variables.w4a8_max_answers));
    if (tooMany) {
        refuse(r, 400, tooMany.message, tooMany.param);
        return;
    }
    const cap = Number(r.variables.w4a8_max_tokens);
    const limit = LIMITS[r.uri];
    let given = false, nulls = false;
    for (let i = 0; i < limit.names.length; i++) {
        const name = limit.names[i];
        const value = body[name];
        if (value === undefined) {
            continue;
        } else if (value === null) {
            nulls = true;
        } else if (typeof value !== 'number' || !(value <= cap)) {
            refuse(r, 400, name + ' must be a number of at most ' + cap, name);
            return;
        } else {
            given = true;
        }
    }
    if (!given && (limit.unset || nulls)) {
        // At the end, and the rest as it came: of a key that occurs twice, the last one counts.
        const rest = text.slice(0, text.lastIndexOf('}'));
        const comma = Object.keys(body).length ? ',' : '';
        text = rest + comma + '"' + limit.fill + '":' + cap + '}';
        body[limit.fill] = cap;
    }
    r.variables.w4a8_body = text;
    // nginx hangs up on a copy when the headers of its answer have come. Those of a stream come at once, and vLLM
    // aborts what nobody listens to; those of a whole answer come when it is done.
    if (r.variables.w4a8_copy === '1') {
        body.stream = false;
        delete body.stream_options;
        r.variables.w4a8_copied = JSON.stringify(body);
    }
    r.internalRedirect('@serve');
}

function accept(r) {
    r.return(202);
}

export default {admit, accept};
